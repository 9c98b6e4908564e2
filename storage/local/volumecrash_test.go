package local

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/storage"
)

// childEnv makes the test binary a process that acts on volumes, and dies at a
// failpoint.
const childEnv = "ATOLL_TEST_VOLUME_ACT"

// A doomed is what such a process does.
type doomed struct {
	Config DisksConfig
	Act    string
}

// The volumes and snapshots of the crash test. "old" is there before each act.
func (a doomed) do(ctx context.Context, d *Disks) error {
	old, err := d.Create(ctx, storage.Claim{Name: "old", Bytes: 4 * mib, Policy: "thin"})
	if err != nil {
		return err
	}
	switch a.Act {
	case "create":
		_, err = d.Create(ctx, storage.Claim{Name: "new", Bytes: 4 * mib, Policy: "thin"})
	case "clone":
		_, err = d.Create(ctx, storage.Claim{Name: "new", Policy: "thin", Source: &storage.Source{VolumeID: old.ID}})
	case "snapshot":
		_, err = d.Snapshot(ctx, old.ID, "snap", nil)
	case "live clone", "live snapshot":
		if _, err = d.Attach(ctx, old.ID, holder(d.cfg.Host), storage.AttachOptions{}); err != nil {
			break
		}
		if a.Act == "live clone" {
			_, err = d.Create(ctx, storage.Claim{Name: "new", Policy: "thin", Source: &storage.Source{VolumeID: old.ID}})
		} else {
			_, err = d.Snapshot(ctx, old.ID, "snap", nil)
		}
	case "expand":
		_, err = d.Expand(ctx, old.ID, 8*mib)
	case "attach":
		_, err = d.Attach(ctx, old.ID, holder(d.cfg.Host), storage.AttachOptions{})
	case "detach":
		if _, err = d.Attach(ctx, old.ID, holder(d.cfg.Host), storage.AttachOptions{}); err == nil {
			err = d.Detach(ctx, old.ID, holder(d.cfg.Host))
		}
	case "delete":
		if _, err = d.Create(ctx, storage.Claim{Name: "new", Bytes: 4 * mib, Policy: "thin"}); err == nil {
			err = d.Delete(ctx, volumeID(d.stores.cfg.id(), "new"))
		}
	default:
		err = errors.New("unknown act " + a.Act)
	}
	return err
}

// id is the first datastore's.
func (c DisksConfig) id() string {
	s := &stores{cfg: c, known: map[string]*datastore{}}
	d, err := s.meet(c.Datastores[0])
	if err != nil {
		panic(err)
	}
	return d.id
}

func TestMain(m *testing.M) {
	arg := os.Getenv(childEnv)
	if arg == "" {
		os.Exit(m.Run())
	}
	var a doomed
	err := json.Unmarshal([]byte(arg), &a)
	if err == nil {
		var d *Disks
		a.Config.Live = &fakeVMs{base: a.Config}
		if d, err = OpenDisks(context.Background(), a.Config); err == nil {
			err = a.do(context.Background(), d)
		}
	}
	if err != nil {
		os.Stderr.WriteString(err.Error() + "\n")
		os.Exit(1)
	}
	os.Exit(0)
}

// crashBinary is this test with failpoints.
func crashBinary(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "crash.test")
	if out, err := exec.CommandContext(t.Context(), "go", "test", "-c", "-tags", "failpoints", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("go test -c: %v\n%s", err, out)
	}
	return bin
}

// TestKilledAtEveryStep kills a process at each point of each act on volumes.
// What comes next must find the volume that was there as it was, nothing half
// made, no file without a record, and be able to do the act.
func TestKilledAtEveryStep(t *testing.T) {
	if testing.Short() {
		t.Skip("builds a test binary")
	}
	bin := crashBinary(t)
	var visited []failpoint.Point
	for _, c := range []struct {
		act    string
		format string
		points []failpoint.Point
	}{
		{"create", "raw", []failpoint.Point{failpoint.VolumeIntended, failpoint.VolumeFileMade, failpoint.VolumeReady}},
		{"clone", "raw", []failpoint.Point{failpoint.VolumeCopyIntended, failpoint.VolumeCopied}},
		{"clone", "qcow2", []failpoint.Point{failpoint.VolumeOverlayIntended, failpoint.VolumeOverlayMade, failpoint.VolumeOverlaid, failpoint.VolumeCopied}},
		{"snapshot", "raw", []failpoint.Point{failpoint.VolumeCopyIntended, failpoint.SnapshotCopied, failpoint.SnapshotReady}},
		{"snapshot", "qcow2", []failpoint.Point{failpoint.VolumeOverlayIntended, failpoint.VolumeOverlayMade, failpoint.VolumeOverlaid, failpoint.SnapshotCopied, failpoint.SnapshotReady}},
		{"live clone", "raw", []failpoint.Point{failpoint.VolumeCopyIntended, failpoint.VolumeLiveCopied, failpoint.VolumeCopied}},
		{"live clone", "qcow2", []failpoint.Point{failpoint.VolumeTopIntended, failpoint.VolumeLiveCopied, failpoint.VolumeCopied}},
		{"live snapshot", "raw", []failpoint.Point{failpoint.VolumeLiveCopied, failpoint.SnapshotCopied, failpoint.SnapshotReady}},
		{"live snapshot", "qcow2", []failpoint.Point{failpoint.VolumeTopIntended, failpoint.VolumeLiveCopied, failpoint.SnapshotReady}},
		{"expand", "raw", []failpoint.Point{failpoint.VolumeGrowing, failpoint.VolumeGrown}},
		{"expand", "qcow2", []failpoint.Point{failpoint.VolumeGrowing, failpoint.VolumeGrown}},
		{"attach", "raw", []failpoint.Point{failpoint.VolumeLeased}},
		{"detach", "raw", []failpoint.Point{failpoint.VolumeLeaseEnded}},
		{"delete", "raw", []failpoint.Point{failpoint.VolumeDeleting, failpoint.VolumeFilesErased, failpoint.VolumeErased}},
	} {
		for _, p := range c.points {
			visited = append(visited, p)
			t.Run(c.act+" "+c.format+" "+filepath.Base(string(p)), func(t *testing.T) { killedAt(t, bin, c.act, c.format, p) })
		}
	}
	for _, p := range failpoint.Volumes {
		if !slices.Contains(visited, p) && strings.HasPrefix(string(p), "volume/") {
			t.Errorf("no process is killed at %s", p)
		}
	}
}

func killedAt(t *testing.T, bin, act, format string, point failpoint.Point) {
	cfg := testConfig(t, scratch(t), "node-a", format)
	d := openTest(t, cfg)
	old := mustCreate(t, d, "old", "thin", 4*mib)
	a, err := attach(d, old.ID)
	if err != nil {
		t.Fatal(err)
	}
	writeContent(t, a, 0, []byte("precious"))
	if err := d.Detach(t.Context(), old.ID, holder("node-a")); err != nil {
		t.Fatal(err)
	}
	do := doomed{cfg, act}
	arg, err := json.Marshal(do)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), bin)
	cmd.Env = append(os.Environ(), childEnv+"="+string(arg), "ATOLL_FAILPOINT="+string(point)+"=kill")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != -1 {
		t.Fatalf("the process did not die at %s: %v\n%s", point, err, out)
	}

	cfg.Live = &fakeVMs{base: cfg}
	d = openTest(t, cfg)
	wantNoOrphans(t, d)
	got, err := d.Get(t.Context(), old.ID)
	if err != nil || got.Bytes != 4*mib && act != "expand" {
		t.Fatalf("the volume that was there = %+v, %v", got, err)
	}
	if err := do.do(t.Context(), d); err != nil {
		t.Errorf("%s after the crash: %v", act, err)
	}
	if err := d.Detach(t.Context(), old.ID, holder("node-a")); err != nil {
		t.Error(err)
	}
	wantPrecious(t, d, act, old.ID)
	for _, id := range mustIDs(t, d) {
		if err := d.Delete(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	snaps, err := d.ListSnapshots(t.Context(), "")
	if err != nil {
		t.Error(err)
	}
	for _, s := range snaps {
		if err := d.DeleteSnapshot(t.Context(), s.ID); err != nil {
			t.Error(err)
		}
	}
	if left := files(t, d); len(left) != 0 {
		t.Errorf("when all was deleted %q is left", left)
	}
}

// wantPrecious looks for the content in all that should have it.
func wantPrecious(t *testing.T, d *Disks, act, old string) {
	t.Helper()
	of := []string{old}
	for _, id := range mustIDs(t, d) {
		if strings.HasSuffix(act, "clone") && id != old {
			of = append(of, id)
		}
	}
	if strings.HasSuffix(act, "snapshot") {
		s, err := d.ListSnapshots(t.Context(), old)
		if err != nil || len(s) != 1 {
			t.Fatalf("snapshots = %v, %v", s, err)
		}
		v, err := d.Create(t.Context(), storage.Claim{Name: "restored", Policy: "thin", Source: &storage.Source{SnapshotID: s[0].ID}})
		if err != nil {
			t.Fatal(err)
		}
		of = append(of, v.ID)
	}
	for _, id := range of {
		a, err := attach(d, id)
		if err != nil {
			t.Fatal(err)
		}
		if want := int64(8 * mib); act == "expand" && a.Bytes != want {
			t.Errorf("expanded it is %d bytes, want %d", a.Bytes, want)
		}
		if got := string(readContent(t, a, 0, 8)); got != "precious" {
			t.Errorf("volume %s begins with %q", id, got)
		}
		if err := d.Detach(t.Context(), id, holder("node-a")); err != nil {
			t.Error(err)
		}
	}
}

func mustIDs(t *testing.T, d *Disks) (out []string) {
	t.Helper()
	vs, err := d.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range vs {
		out = append(out, v.ID)
	}
	return out
}

// wantNoOrphans checks that every file in the datastores belongs to something
// whole.
func wantNoOrphans(t *testing.T, d *Disks) {
	t.Helper()
	whole := map[string]bool{}
	note := func(_ *datastore, r record) {
		whole[recordPath(r.ID)] = true
		for _, f := range r.chain() {
			whole[f.path()] = true
		}
		whole[leasePath(r.ID)] = true
	}
	for _, kind := range []string{"v", "s"} {
		if err := d.each(t.Context(), kind, note); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range files(t, d) {
		if !whole[f] {
			t.Errorf("%s belongs to nothing", f)
		}
	}
}

// files are all that volumes have brought into the datastores.
func files(t *testing.T, d *Disks) (out []string) {
	t.Helper()
	for _, s := range d.cfg.Datastores {
		for _, dir := range []string{volumesDir, snapshotsDir, leasesDir, disksDir} {
			err := filepath.WalkDir(filepath.Join(s.Path, dir), func(path string, e fs.DirEntry, err error) error {
				if err == nil && !e.IsDir() {
					rel, _ := filepath.Rel(s.Path, path)
					out = append(out, rel)
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	return out
}
