package qemu

import (
	"context"
	"log/slog"
	"os"
	"testing"
	"time"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/vmpodtest"
)

func TestSmoke(t *testing.T) {
	g := vmpodtest.BuildGuest(t)
	dir, err := os.MkdirTemp("/run", "atolltest")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	d, err := New(Config{Guest: Guest{Kernel: g.Kernel, Initrd: g.Initrd}, StateDir: dir + "/s", RunDir: dir + "/r", UID: 64055, GID: 64055, Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	disk := dir + "/eph"
	os.WriteFile(disk, []byte("hello disk\n"), 0o600)
	os.Truncate(disk, 64<<20)
	spec := vmpod.Spec{ID: vmpod.ID{PodUID: "smoke"}, CPUs: 1, Memory: 128 << 20, Disks: []vmpod.Disk{{ID: "eph", Path: disk}}}
	t0 := time.Now()
	ctx := context.Background()
	m, err := d.Launch(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Remove(ctx)
	t.Log("launched", time.Since(t0))
	k := vmpodtest.Dial(t, m)
	t.Log("answers", time.Since(t0))
	for _, c := range []string{"boot", "cpus", "memory", "disks", "nics", "read eph", "write eph 3"} {
		t.Log(c, k.Ask(c))
	}
	t.Log(m.Status(ctx))
	t.Log(m.(vmpod.Meter).Usage(ctx))
	t0 = time.Now()
	t.Log(m.Stop(ctx, 10*time.Second), time.Since(t0))
	t.Log(m.Wait(ctx))
	b, _ := os.ReadFile(dir + "/s/smoke_0/console.log")
	t.Logf("%s", b)
	t.Log(m.Remove(ctx))
}
