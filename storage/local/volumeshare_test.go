package local

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/storagetest"
)

// xfs mounts a new XFS, whose files can share blocks.
func xfs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	image, at := filepath.Join(dir, "xfs.img"), filepath.Join(dir, "mnt")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 512*mib); err != nil {
		t.Fatal(err)
	}
	mkfs, err := exec.LookPath("mkfs.xfs")
	if err != nil {
		t.Skip("mkfs.xfs is not installed")
	}
	if out, err := exec.CommandContext(t.Context(), mkfs, "-q", image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.xfs: %v\n%s", err, out)
	}
	if err := os.Mkdir(at, 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "mount", "-o", "loop", image, at).CombinedOutput(); err != nil {
		t.Skipf("cannot mount an XFS here: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return at
}

// TestDisksThatShareBlocks runs the suite where snapshots and clones take no
// space, and can be taken of what a VM writes to.
func TestDisksThatShareBlocks(t *testing.T) {
	base := xfs(t)
	n := map[*testing.T]string{}
	storagetest.TestDisks(t, storagetest.Disks{
		Open: func(t *testing.T, host string) storage.Disks {
			if n[t] == "" {
				dir, err := os.MkdirTemp(base, "part-")
				if err != nil {
					t.Fatal(err)
				}
				n[t] = dir
			}
			return openTest(t, testConfig(t, n[t], host, storage.FormatRaw))
		},
		Thin: "thin", Thick: "thick", Shared: "anywhere", Write: writeContent, Read: readContent, LiveSnapshots: true,
	})
}

func TestSharedBlocksTakeNoSpace(t *testing.T) {
	base := xfs(t)
	c := testConfig(t, base, "node-a", storage.FormatRaw)
	c.Datastores[1].Path, c.Datastores[1].MountPoint = base, true
	d := openTest(t, c)
	if _, err := d.Capacity(t.Context(), "anywhere", storage.Topology{}); err == nil {
		t.Error("a mount point with something in it became a datastore")
	}
	v := mustCreate(t, d, "pvc-1", "thin", 64*mib)
	a, err := attach(d, v.ID)
	if err != nil {
		t.Fatal(err)
	}
	writeContent(t, a, 0, make32MiB())
	before := freeBytes(t, base)
	if _, err := d.Snapshot(t.Context(), v.ID, "snap", nil); err != nil {
		t.Fatal(err)
	}
	if took := before - freeBytes(t, base); took > 4*mib {
		t.Errorf("a snapshot of 32 MiB took %d bytes", took)
	}
}

func make32MiB() []byte {
	b := make([]byte, 32*mib)
	for i := range b {
		b[i] = byte(i>>12) | 1
	}
	return b
}

func freeBytes(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Bfree) * st.Bsize
}
