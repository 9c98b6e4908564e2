package local

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/storage"
)

func mustCreate(t *testing.T, d *Disks, name, policy string, bytes int64) storage.Volume {
	t.Helper()
	v, err := d.Create(t.Context(), storage.Claim{Name: name, Bytes: bytes, Policy: policy})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func holder(host string) storage.Holder { return storage.Holder{VM: "vm-1_0", Host: host} }

func attach(d *Disks, id string) (storage.Attachment, error) {
	return d.Attach(context.Background(), id, holder(d.cfg.Host), storage.AttachOptions{})
}

// fileOf is a volume's own file on the host.
func fileOf(t *testing.T, d *Disks, id string) string {
	t.Helper()
	ds, root, r, err := d.openVolume(id)
	if err != nil || r == nil {
		t.Fatalf("volume %s: %v", id, err)
	}
	defer root.Close()
	return ds.path(r.Disk.path())
}

// TestDamage changes what lies in the datastore. Nothing that is not what its
// record says is opened, and nothing of it is deleted or mended.
func TestDamage(t *testing.T) {
	truncate := func(bytes int64) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			if err := os.Truncate(path, bytes); err != nil {
				t.Fatal(err)
			}
		}
	}
	scribble := func(at int64) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt([]byte("scribbled"), at); err != nil {
				t.Fatal(err)
			}
		}
	}
	replaceBy := func(make func(path string) error) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			if err := os.Rename(path, path+".kept"); err != nil {
				t.Fatal(err)
			}
			if err := make(path); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		policy string
		format string
		record bool // it is the record that is damaged
		damage func(*testing.T, string)
	}{
		"a shorter file":       {"thin", "raw", false, truncate(mib)},
		"a longer file":        {"thin", "raw", false, truncate(64 * mib)},
		"no file":              {"thin", "raw", false, replaceBy(func(string) error { return nil })},
		"a link to another":    {"thin", "raw", false, replaceBy(func(p string) error { return os.Symlink("/etc/passwd", p) })},
		"a directory":          {"thin", "raw", false, replaceBy(func(p string) error { return os.Mkdir(p, 0o700) })},
		"a pipe":               {"thin", "raw", false, replaceBy(func(p string) error { return unix.Mkfifo(p, 0o600) })},
		"a qcow2 without head": {"thin", "qcow2", false, scribble(0)},
		"a LUKS without head":  {"sealed", "raw", false, scribble(0)},
		"a record cut off":     {"thin", "raw", true, truncate(40)},
		"an empty record":      {"thin", "raw", true, truncate(0)},
		"a changed record": {"thin", "raw", true, func(t *testing.T, path string) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(strings.Replace(string(b), `"bytes": 4194304`, `"bytes": 8388608`, 1)), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		"a record that leaves": {"thin", "raw", true, func(t *testing.T, path string) {
			forge(t, path, func(r *record) { r.Disk.Name = "../../../etc/passwd" })
		}},
		"another's record": {"thin", "raw", true, func(t *testing.T, path string) { forge(t, path, func(r *record) { r.ID = strings.ToUpper(r.ID) }) }},
	} {
		t.Run(name, func(t *testing.T) {
			d := openTest(t, testConfig(t, scratch(t), "node-a", c.format))
			v := mustCreate(t, d, "pvc-1", c.policy, 4*mib)
			other := mustCreate(t, d, "pvc-2", "thin", mib)
			ds, err := d.stores.of(v.ID, "v")
			if err != nil {
				t.Fatal(err)
			}
			record, file := ds.path(recordPath(v.ID)), fileOf(t, d, v.ID)
			if c.record {
				c.damage(t, record)
			} else {
				c.damage(t, file)
			}
			d = openTest(t, d.cfg)
			if _, err := attach(d, v.ID); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), v.ID) {
				t.Errorf("Attach: %v, want DataLoss and the volume's name", err)
			}
			if _, err := d.Snapshot(t.Context(), v.ID, "snap", nil); !errdefs.IsDataLoss(err) {
				t.Errorf("Snapshot: %v, want DataLoss", err)
			}
			if _, err := d.Expand(t.Context(), v.ID, 16*mib); !errdefs.IsDataLoss(err) {
				t.Errorf("Expand: %v, want DataLoss", err)
			}
			if c.record {
				if err := d.Delete(t.Context(), v.ID); !errdefs.IsDataLoss(err) {
					t.Errorf("Delete: %v, want DataLoss", err)
				}
				_, err := d.Create(t.Context(), storage.Claim{Name: "pvc-1", Bytes: 4 * mib, Policy: c.policy})
				if !errdefs.IsDataLoss(err) {
					t.Errorf("Create of the same name: %v, want DataLoss", err)
				}
				vs, err := d.List(t.Context())
				if !errdefs.IsDataLoss(err) || len(vs) != 1 || vs[0].ID != other.ID {
					t.Errorf("List = %v, %v; want the other volume, and DataLoss", vs, err)
				}
				for _, path := range []string{record, file} {
					if _, err := os.Lstat(path); err != nil {
						t.Errorf("what could not be understood was removed: %v", err)
					}
				}
			}
			if _, err := attach(d, other.ID); err != nil {
				t.Errorf("another volume cannot be used: %v", err)
			}
		})
	}
}

// forge writes a record that is wrong and whole.
func forge(t *testing.T, path string, change func(*record)) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		t.Fatal(err)
	}
	change(&r)
	if r.Sum, err = r.sum(); err != nil {
		t.Fatal(err)
	}
	if b, err = json.Marshal(r); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestDatastoreAway takes a datastore away. What is in it is unknown, not gone,
// and nothing is made in the empty directory that is left.
func TestDatastoreAway(t *testing.T) {
	for name, away := range map[string]func(t *testing.T, path string){
		"an empty mount point": func(t *testing.T, path string) {
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
		},
		"nothing": func(*testing.T, string) {},
		"another datastore": func(t *testing.T, path string) {
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
			if _, err := adopt(Datastore{Name: "own", Path: path}); err != nil {
				t.Fatal(err)
			}
		},
		"a marker that is none": func(t *testing.T, path string) {
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(path, markerFile), []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := openTest(t, testConfig(t, scratch(t), "node-a", "raw"))
			v := mustCreate(t, d, "pvc-1", "thin", mib)
			path := d.cfg.Datastores[0].Path
			if err := os.Rename(path, path+".away"); err != nil {
				t.Fatal(err)
			}
			away(t, path)
			before := names(path)
			for _, d := range []*Disks{d, openTest(t, d.cfg)} { // also after a restart
				_, gerr := d.Get(t.Context(), v.ID)
				_, cerr := d.Create(t.Context(), storage.Claim{Name: "pvc-2", Bytes: mib, Policy: "thin"})
				_, aerr := attach(d, v.ID)
				_, caperr := d.Capacity(t.Context(), "thin", storage.Topology{})
				_, lerr := d.List(t.Context())
				_, herr := d.Holders(t.Context(), v.ID)
				_, ferr := d.Fence(t.Context(), holder("node-a"))
				for what, err := range map[string]error{"Get": gerr, "Create": cerr, "Attach": aerr, "Capacity": caperr, "List": lerr, "Holders": herr, "Fence": ferr,
					"Delete": d.Delete(t.Context(), v.ID), "Detach": d.Detach(t.Context(), v.ID, holder("node-a"))} {
					if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), path) {
						t.Errorf("%s: %v, want Unavailable and the path", what, err)
					}
				}
				if c, err := d.Compliance(t.Context(), v.ID); err != nil || c.State != storage.ComplianceUnknown {
					t.Errorf("Compliance = %+v, %v; want unknown", c, err)
				}
				mustCreate(t, d, "pvc-elsewhere", "anywhere", mib) // other datastores are there
			}
			if now := names(path); !slices.Equal(now, before) {
				t.Errorf("in the place of the datastore is %q now, was %q", now, before)
			}
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(path+".away", path); err != nil {
				t.Fatal(err)
			}
			if got, err := d.Get(t.Context(), v.ID); err != nil || got.ID != v.ID {
				t.Errorf("Get once it is back = %+v, %v", got, err)
			}
		})
	}
}

func names(dir string) []string {
	entries, _ := os.ReadDir(dir)
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func TestDatastoreIsOnlyMadeInAnEmptyDirectory(t *testing.T) {
	c := testConfig(t, scratch(t), "node-a", "raw")
	photo := filepath.Join(c.Datastores[0].Path, "photo.jpg")
	if err := os.WriteFile(photo, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d := openTest(t, c)
	_, err := d.Create(t.Context(), storage.Claim{Name: "pvc-1", Bytes: mib, Policy: "thin"})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "photo.jpg") {
		t.Errorf("Create in a directory with something in it: %v", err)
	}
	if got := names(c.Datastores[0].Path); !slices.Equal(got, []string{"photo.jpg"}) {
		t.Errorf("the directory has %q now", got)
	}
	c.Datastores[1].MountPoint = true
	if _, err := openTest(t, c).Capacity(t.Context(), "anywhere", storage.Topology{}); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "mounted") {
		t.Errorf("Capacity where nothing is mounted: %v", err)
	}
}

// TestHolderOfARebootedHost frees what a host held that has booted again, and
// nothing of one that is only silent.
func TestHolderOfARebootedHost(t *testing.T) {
	base := scratch(t)
	a, b := openTest(t, testConfig(t, base, "node-a", "raw")), openTest(t, testConfig(t, base, "node-b", "raw"))
	v := mustCreate(t, a, "pvc-1", "anywhere", mib)
	if _, err := attach(a, v.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := attach(b, v.ID); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "last heard of") {
		t.Errorf("Attach of what a silent host has: %v", err)
	}
	again := a.cfg
	again.BootID = "boot-2-of-node-a"
	a = openTest(t, again)
	if hs, err := b.Holders(t.Context(), v.ID); err != nil || len(hs) != 0 {
		t.Errorf("Holders after its host has booted = %v, %v", hs, err)
	}
	if _, err := attach(b, v.ID); err != nil {
		t.Errorf("Attach of what a host held before it booted: %v", err)
	}
	if _, err := attach(a, v.ID); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("Attach by the host that came back: %v", err)
	}
	// What a damaged lease says is not known, so nobody gets it.
	if err := os.WriteFile(filepath.Join(base, "shared", leasePath(v.ID)), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := attach(b, v.ID); !errdefs.IsDataLoss(err) {
		t.Errorf("Attach with a damaged lease: %v", err)
	}
	if err := b.Delete(t.Context(), v.ID); !errdefs.IsDataLoss(err) {
		t.Errorf("Delete with a damaged lease: %v", err)
	}
}

// TestOpenImageIsNotGivenAway has what QEMU itself would lock: no lease counts
// against that.
func TestOpenImageIsNotGivenAway(t *testing.T) {
	d := openTest(t, testConfig(t, scratch(t), "node-a", "raw"))
	v := mustCreate(t, d, "pvc-1", "thin", mib)
	f, err := os.OpenFile(fileOf(t, d, v.ID), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	lock := unix.Flock_t{Type: unix.F_RDLCK, Start: qemuLocks + 1, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
		t.Fatal(err)
	}
	_, aerr := attach(d, v.ID)
	for what, err := range map[string]error{"Attach": aerr, "Delete": d.Delete(t.Context(), v.ID)} {
		if !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s of what a QEMU has open: %v", what, err)
		}
	}
	f.Close()
	if _, err := attach(d, v.ID); err != nil {
		t.Error(err)
	}
}

func TestKeyFiles(t *testing.T) {
	for name, c := range map[string]struct {
		content string
		mode    os.FileMode
	}{
		"others can read it": {"a key for a test, 32 bytes long.", 0o644},
		"it is short":        {"short", 0o600},
		"it is long":         {strings.Repeat("k", 513), 0o600},
	} {
		cfg := testConfig(t, scratch(t), "node-a", "raw")
		key := cfg.Datastores[0].Policies[2].KeyFile
		if err := os.WriteFile(key, []byte(c.content), c.mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(key, c.mode); err != nil {
			t.Fatal(err)
		}
		d := openTest(t, cfg)
		_, err := d.Create(t.Context(), storage.Claim{Name: "pvc-1", Bytes: mib, Policy: "sealed"})
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), key) {
			t.Errorf("%s: %v", name, err)
		}
		if left := names(filepath.Join(cfg.Datastores[0].Path, disksDir)); len(left) != 0 {
			t.Errorf("%s: %q was left", name, left)
		}
	}
}
