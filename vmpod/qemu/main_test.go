package qemu

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"testing"

	"github.com/openatoll/atoll/vmpod"
)

// victimEnv holds a victim as JSON and makes the test binary that driver.
const victimEnv = "ATOLL_TEST_VICTIM"

// A victim is a driver's process that is there to be killed.
type victim struct {
	Config Config
	Spec   vmpod.Spec
	// Disk is plugged and copied to the file CopyTo, if that is set.
	Disk   vmpod.Disk
	CopyTo string
}

func TestMain(m *testing.M) {
	RunProbeChild()
	if v := os.Getenv(victimEnv); v != "" {
		beVictim(v)
	}
	os.Exit(m.Run())
}

// beVictim launches a VM, saying when it begins and when it has, and waits
// for its end.
func beVictim(arg string) {
	var v victim
	err := json.Unmarshal([]byte(arg), &v)
	var d *Driver
	if err == nil {
		d, err = New(v.Config)
	}
	if err == nil {
		fmt.Println("begin")
		var m vmpod.Machine
		m, err = d.Launch(context.Background(), v.Spec)
		if err == nil && v.CopyTo != "" {
			err = copyTo(m.(*Machine), v.Disk, v.CopyTo)
		}
	}
	if err != nil {
		fmt.Println("failed:", err)
		os.Exit(1)
	}
	fmt.Println("launched")
	select {}
}

func copyTo(m *Machine, d vmpod.Disk, path string) error {
	if err := m.Plug(context.Background(), vmpod.Device{Disk: &d}); err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return m.CopyDisk(context.Background(), d.ID, f, nil)
}
