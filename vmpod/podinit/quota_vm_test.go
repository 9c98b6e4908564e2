package podinit

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// TestQuota fills one of two volumes beyond its limit: that one alone is full,
// and what volumes and writable layers hold is known to the page at once.
func TestQuota(t *testing.T) {
	guest, err := buildGuest()
	if err != nil {
		t.Fatal(err)
	}
	if !guest.Quota {
		t.Fatalf("kernel %s has no project quotas", guest.KernelRelease)
	}
	vm := bootVM(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	g := guestOps{vm.attach(), t, ctx}
	if _, err := g.SetupSandbox(ctx, setupRequest()); err != nil {
		t.Fatal(err)
	}
	mount := func(r *agentapi.CreateContainerRequest) {
		for _, id := range []string{"other", "small", "free"} {
			r.Mounts = append(r.Mounts, &agentapi.VolumeMount{Volume: id, Destination: "/" + id})
		}
		r.Mounts = append(r.Mounts, &agentapi.VolumeMount{Volume: "small", SubPath: "deep/er", Destination: "/sub"})
	}
	for id, limit := range map[string]int64{"small": 4 << 20, "other": 8 << 20, "free": 0} {
		if _, err := g.AddVolume(ctx, &agentapi.AddVolumeRequest{Id: id, SizeLimit: limit}); err != nil {
			t.Fatal(err)
		}
	}
	// The writable layer, too: what overlayfs does in it must go on working.
	script := `dd if=/dev/zero of=/sub/fill bs=64k count=128 2>&1; ls -l /sub/fill
dd if=/dev/zero of=/other/fill bs=1M count=7 2>&1 | grep -c "7+0 records out" | sed s/^/other:/
dd if=/dev/zero of=/free/fill bs=1M count=20 2>&1 | grep -c "20+0 records out" | sed s/^/free:/
dd if=/dev/zero of=/etc/fill bs=1M count=3 2>/dev/null
mv /etc/passwd /etc/other && ln /etc/other /etc/third && rm /etc/other && rm -r /data && mkdir /data && touch /data/x && mv /data /moved && cat /etc/third
stat -f -c "size:%b blocks of %s" /small` // not df, which shows the first mount of the file system
	g.create("c", ociSpec("sh", "-c", script), mount)
	g.start("c")
	g.wait("c", "")
	out := g.logs("c")
	for _, want := range []string{"Disk quota exceeded", "other:1", "free:1", "root:x:0:0", "size:1280 blocks of 4096"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is missing in:\n%s", want, out)
		}
	}
	stats, err := g.Stats(ctx, &agentapi.StatsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	near := func(what string, u *agentapi.FilesystemStats, bytes, inodes uint64) {
		if u.UsedBytes < bytes || u.UsedBytes > bytes+64<<10 || u.UsedInodes != inodes {
			t.Errorf("%s: %d bytes, %d inodes; want %d bytes or a little more, %d inodes", what, u.UsedBytes, u.UsedInodes, bytes, inodes)
		}
	}
	for _, v := range stats.Volumes {
		switch v.Id {
		case "small": // a write stops between the limit and where it begins to be felt
			if v.Usage.UsedBytes <= 4<<20 || v.Usage.UsedBytes > 5<<20 || v.Usage.CapacityBytes != 5<<20 {
				t.Errorf("small: %v; want more than its limit, and 1 MiB more at most", v.Usage)
			}
		case "other":
			near(v.Id, v.Usage, 7<<20, 2)
		case "free":
			near(v.Id, v.Usage, 20<<20, 2)
		}
	}
	if w := stats.Containers[0].Writable; w.UsedBytes < 3<<20 || w.UsedBytes > 3<<20+128<<10 {
		t.Errorf("writable layer: %v; want 3 MiB and a little", w)
	}
	g.remove("c")
	if _, err := g.RemoveVolume(ctx, &agentapi.RemoveVolumeRequest{Id: "small"}); err != nil {
		t.Error(err)
	}
}
