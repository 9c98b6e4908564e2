package qemu

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod"
)

func TestCheckShare(t *testing.T) {
	for name, s := range map[string]vmpod.Share{
		"no ID":            {Path: "/a"},
		"a comma":          {ID: "a,b", Path: "/a"},
		"relative":         {ID: "a", Path: "a"},
		"not clean":        {ID: "a", Path: "/a/../b"},
		"read-only nested": {ID: "a", Path: "/a", RecursiveReadOnly: true},
	} {
		if err := checkShare(s); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := checkShare(vmpod.Share{ID: "h0123", Path: "/a b,c"}); err != nil {
		t.Error(err)
	}
	spec := smallSpec("boot-5a5a")
	spec.Shares = []vmpod.Share{{ID: "a", Path: "/a"}}
	if err := checkSpec(spec); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a spec with shares: %v", err)
	}
}

func TestPermit(t *testing.T) {
	m := &Machine{d: &Driver{cfg: Config{HostDirectories: []vmpod.HostDirectory{{Path: "/srv/data"}, {Path: "/srv/data/kept", ReadOnly: true}}}}, proc: process{SharedMemory: true}}
	for _, tt := range []struct {
		name  string
		share vmpod.Share
		ok    bool
	}{
		{"the directory", vmpod.Share{Path: "/srv/data"}, true},
		{"below it", vmpod.Share{Path: "/srv/data/a", Follow: true}, true},
		{"beside it", vmpod.Share{Path: "/srv/database"}, false},
		{"above it", vmpod.Share{Path: "/srv"}, false},
		{"kept, to be written", vmpod.Share{Path: "/srv/data/kept/a"}, false},
		{"kept, with what is below", vmpod.Share{Path: "/srv/data/kept/a", ReadOnly: true}, false},
		{"kept", vmpod.Share{Path: "/srv/data/kept/a", ReadOnly: true, RecursiveReadOnly: true}, true},
		{"kept, followed", vmpod.Share{Path: "/srv/data/kept", ReadOnly: true, RecursiveReadOnly: true, Follow: true}, false},
	} {
		if _, err := m.permit(tt.share); tt.ok != (err == nil) || err != nil && !errdefs.IsPermissionDenied(err) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	m.proc.SharedMemory = false
	if _, err := m.permit(vmpod.Share{Path: "/srv/data"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a VM without shared memory: %v", err)
	}
}

func TestServerArguments(t *testing.T) {
	for _, tt := range []struct {
		rust bool
		want []string
	}{
		{false, []string{"source=/place", "sandbox=namespace", "modcaps=-mknod", "announce_submounts", "--fd=3", "--rlimit-nofile=99"}},
		{true, []string{"--shared-dir=/place", "--sandbox=namespace", "--modcaps=-mknod", "--announce-submounts", "--fd=3", "--rlimit-nofile=99"}},
	} {
		args := virtiofsd{rust: tt.rust}.args("/place", 99)
		for _, w := range tt.want {
			if !slices.Contains(args, w) {
				t.Errorf("rust %v: %q has no %s", tt.rust, args, w)
			}
		}
	}
}

// Records of VMs without shares are as they were.
func TestShareRecord(t *testing.T) {
	b, err := json.Marshal(deviceTable{})
	if err != nil || strings.Contains(string(b), "shares") {
		t.Errorf("%s, %v", b, err)
	}
	table := deviceTable{Shares: []shareEntry{{Share: vmpod.Share{ID: "a", Path: "/a"}, Slot: 1}, {Share: vmpod.Share{ID: "b", Path: "/b"}, Slot: 2}}}
	after := table.with("b", process{PID: 7})
	if table.Shares[1].Server != nil || after.Shares[0].Server != nil || after.Shares[1].Server.PID != 7 {
		t.Errorf("%+v, %+v", table, after)
	}
	if slot, ok := after.freeSlot(); !ok || slot != 3 {
		t.Errorf("the next slot is %d, %v", slot, ok)
	}
	if spec := after.spec(vmpod.Spec{}); len(spec.Shares) != 2 || spec.Shares[1].Path != "/b" {
		t.Errorf("spec: %+v", spec)
	}
}

func TestSharedMemory(t *testing.T) {
	c := command{spec: smallSpec("mem-1"), shared: true}
	if got := c.memoryBackend(&fakeFDs{}); got != "memory-backend-memfd,id=ram,size=128M,share=on" {
		t.Error(got)
	}
	c.shared = false
	if got := c.memoryBackend(&fakeFDs{}); got != "memory-backend-ram,id=ram,size=128M" {
		t.Error(got)
	}
	if _, err := (Config{StateDir: "/a", RunDir: "/b", Guest: Guest{Kernel: "/proc/self/exe", Initrd: os.Args[0]},
		HostDirectories: []vmpod.HostDirectory{{Path: "/"}}}).complete(); err == nil {
		t.Error("the whole host may be shared")
	}
}

func TestLostShareIsTold(t *testing.T) {
	f := diskFaults{lost: map[string]string{"b": "/srv/b", "c": "/srv/a", "a": "/srv/a"}}
	reason, message := f.describe(time.Now())
	if reason != vmpod.ReasonHostDirectoryLost || !strings.Contains(message, "/srv/a, /srv/b has ended") {
		t.Errorf("%s: %s", reason, message)
	}
	clear(f.lost) // they were unplugged
	if reason, _ := f.describe(time.Now()); reason != "" {
		t.Errorf("%s, and nothing is wrong", reason)
	}
}
