package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/storagetest"
)

// fakeVMs have all volumes of a host's datastores. What they copy is the file, as
// nobody writes to it: real ones are in vmpod/qemu and cri.
type fakeVMs struct {
	base DisksConfig
	// during, if set, is called when a copy has begun; its error ends it.
	during func(ctx context.Context, progress func(done, total int64)) error
	calls  atomic.Int32
}

func (v *fakeVMs) CopyDisk(ctx context.Context, vm, diskID string, to *os.File, progress func(done, total int64)) error {
	v.calls.Add(1)
	if v.during != nil {
		if err := v.during(ctx, progress); err != nil {
			return err
		}
	}
	for _, s := range v.base.Datastores {
		root, err := os.OpenRoot(s.Path)
		if err != nil {
			return err
		}
		defer root.Close()
		all, err := ids(root, "v")
		if err != nil {
			return err
		}
		for _, id := range all {
			if storage.DiskID(id) != diskID {
				continue
			}
			r, err := readRecord(root, id)
			if err != nil {
				return err
			}
			from, err := root.Open(r.Disk.path())
			if err != nil {
				return err
			}
			defer from.Close()
			_, err = io.Copy(io.NewOffsetWriter(to, 0), from)
			return err
		}
	}
	return fmt.Errorf("VM %s has no disk %s: %w", vm, diskID, errdefs.ErrNotFound)
}

// openLive opens datastores whose files share no blocks, with VMs that copy.
func openLive(t *testing.T, c DisksConfig) (*Disks, *fakeVMs) {
	t.Helper()
	vms := &fakeVMs{base: c}
	c.Live = vms
	d := openTest(t, c)
	all, err := d.stores.all()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		s.noClones.Store(true)
	}
	return d, vms
}

// TestDisksThatVMsCopy runs the suite where VMs copy what they write to.
func TestDisksThatVMsCopy(t *testing.T) {
	for _, format := range []string{storage.FormatRaw, storage.FormatQCOW2} {
		t.Run(format, func(t *testing.T) {
			bases := map[*testing.T]string{}
			storagetest.TestDisks(t, storagetest.Disks{
				Open: func(t *testing.T, host string) storage.Disks {
					if bases[t] == "" {
						bases[t] = t.TempDir()
					}
					d, _ := openLive(t, testConfig(t, bases[t], host, format))
					return d
				},
				Thin: "thin", Thick: "thick", Shared: "anywhere", Write: writeContent, Read: readContent, LiveSnapshots: true,
			})
		})
	}
}

// live is a volume that a VM has, with content.
func live(t *testing.T, d *Disks, policy string) storage.Volume {
	t.Helper()
	v := mustCreate(t, d, "pvc-live", policy, 8*mib)
	a, err := attach(d, v.ID)
	if err != nil {
		t.Fatal(err)
	}
	writeContent(t, a, 0, []byte("precious"))
	return v
}

// blocked has copies wait until release is called.
func blocked(vms *fakeVMs) (begun chan struct{}, release func()) {
	begun = make(chan struct{}, 10)
	goOn := make(chan struct{})
	vms.during = func(ctx context.Context, progress func(done, total int64)) error {
		progress(3*mib, 8*mib)
		begun <- struct{}{}
		select {
		case <-goOn:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return begun, func() { close(goOn) }
}

// TestCopiesOutliveTheirCalls: what takes longer than a caller waits goes on, says
// how far it is, and is found by the next call.
func TestCopiesOutliveTheirCalls(t *testing.T) {
	d, vms := openLive(t, testConfig(t, scratch(t), "node-a", storage.FormatRaw))
	v := live(t, d, "thin")
	acts := map[string]func(context.Context) error{
		"snapshot": func(ctx context.Context) error {
			_, err := d.Snapshot(ctx, v.ID, "snap", nil)
			return err
		},
		"clone": func(ctx context.Context) error {
			_, err := d.Create(ctx, storage.Claim{Name: "clone", Policy: "thin", Source: &storage.Source{VolumeID: v.ID}})
			return err
		},
	}
	for what, act := range acts {
		vms.calls.Store(0)
		begun, release := blocked(vms)
		for range 2 {
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			err := act(ctx)
			cancel()
			if !errdefs.IsAborted(err) || !strings.Contains(err.Error(), "3 of 8 MiB") {
				t.Errorf("%s that takes longer than its call: %v", what, err)
			}
		}
		<-begun
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		if _, err := d.Expand(ctx, v.ID, 16*mib); err == nil {
			t.Errorf("the volume grew while its %s was made", what)
		}
		cancel()
		release()
		if err := act(t.Context()); err != nil {
			t.Errorf("%s, asked for again: %v", what, err)
		}
		if n := vms.calls.Load(); n != 1 {
			t.Errorf("the %s was copied %d times", what, n)
		}
	}
	other := mustCreate(t, d, "other", "thin", mib)
	if _, err := d.Snapshot(t.Context(), other.ID, "snap", nil); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a snapshot of that name, of another volume: %v", err)
	}
	if err := d.Delete(t.Context(), other.ID); err != nil {
		t.Fatal(err)
	}
	if err := d.Detach(t.Context(), v.ID, holder("node-a")); err != nil {
		t.Fatal(err)
	}
	wantPrecious(t, d, "live snapshot", v.ID)
	wantPrecious(t, d, "live clone", v.ID)
}

// TestCopyThatIsDeleted: deleting what is being made ends the copy.
func TestCopyThatIsDeleted(t *testing.T) {
	d, vms := openLive(t, testConfig(t, scratch(t), "node-a", storage.FormatRaw))
	v := live(t, d, "thin")
	before := files(t, d)
	begun, _ := blocked(vms)
	failed := make(chan error, 2)
	go func() { _, err := d.Snapshot(t.Context(), v.ID, "snap", nil); failed <- err }()
	go func() {
		_, err := d.Create(t.Context(), storage.Claim{Name: "clone", Policy: "thin", Source: &storage.Source{VolumeID: v.ID}})
		failed <- err
	}()
	<-begun // the other one waits for the volume
	ds, _ := datastoreOf(v.ID, "v")
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		d.actsMu.Lock()
		n := len(d.acts)
		d.actsMu.Unlock()
		if n == 2 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d acts are under way", n)
		}
	}
	if err := errors.Join(d.DeleteSnapshot(t.Context(), snapshotID(ds, "snap")), d.Delete(t.Context(), volumeID(ds, "clone"))); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := <-failed; !errors.Is(err, context.Canceled) {
			t.Errorf("what was deleted while it was made: %v", err)
		}
	}
	if after := files(t, d); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("files were %q, are %q", before, after)
	}
}

// TestCopyFails looks what is said, and left, when a VM cannot copy.
func TestCopyFails(t *testing.T) {
	for _, format := range []string{storage.FormatRaw, storage.FormatQCOW2} {
		base := scratch(t)
		d, vms := openLive(t, testConfig(t, base, "node-a", format))
		v := live(t, d, "thin")
		before := files(t, d)
		for _, c := range []struct {
			err   error
			is    func(error) bool
			words string
		}{
			{fmt.Errorf("VM gone: %w", errdefs.ErrUnavailable), errdefs.IsUnavailable, "begun again"},
			{fmt.Errorf("no such VM: %w", errdefs.ErrNotFound), errdefs.IsFailedPrecondition, holder("node-a").VM},
			{fmt.Errorf("%w: %w", unix.ENOSPC, errdefs.ErrResourceExhausted), errdefs.IsResourceExhausted, "datastore is full"},
		} {
			vms.during = func(context.Context, func(int64, int64)) error { return c.err }
			if _, err := d.Snapshot(t.Context(), v.ID, "snap", nil); !c.is(err) || !strings.Contains(err.Error(), c.words) {
				t.Errorf("%s: %v", format, err)
			}
			if after := files(t, d); fmt.Sprint(after) != fmt.Sprint(before) {
				t.Errorf("%s: files were %q, are %q", format, before, after)
			}
		}
		vms.during = nil
		if _, err := d.Snapshot(t.Context(), v.ID, "snap", nil); err != nil {
			t.Errorf("%s: afterwards: %v", format, err)
		}
	}
}

// TestCopyOfAnotherHostsVM: only the host that runs the VM can, which any other one
// names. What that host then makes is what the other one was asked for.
func TestCopyOfAnotherHostsVM(t *testing.T) {
	for _, format := range []string{storage.FormatRaw, storage.FormatQCOW2} {
		base := scratch(t)
		d, _ := openLive(t, testConfig(t, base, "node-a", format))
		other, vms := openLive(t, testConfig(t, base, "node-b", format))
		v := live(t, d, "anywhere")
		before := files(t, d)
		snapshot := func(d *Disks) (string, error) {
			s, err := d.Snapshot(t.Context(), v.ID, "snap", nil)
			return s.ID, err
		}
		clone := func(d *Disks) (string, error) {
			c, err := d.Create(t.Context(), storage.Claim{Name: "clone", Policy: "anywhere", Source: &storage.Source{VolumeID: v.ID}})
			return c.ID, err
		}
		for what, do := range map[string]func(*Disks) (string, error){"snapshot": snapshot, "clone": clone} {
			_, err := do(other)
			if held := new(storage.HeldElsewhereError); !errdefs.IsFailedPrecondition(err) || !errors.As(err, &held) || held.Holder != holder("node-a") {
				t.Errorf("%s %s by another host: %v", format, what, err)
			}
		}
		if after := files(t, d); vms.calls.Load() != 0 || fmt.Sprint(after) != fmt.Sprint(before) {
			t.Errorf("%s: %d copies by the other host; files were %q, are %q", format, vms.calls.Load(), before, after)
		}
		for what, do := range map[string]func(*Disks) (string, error){"snapshot": snapshot, "clone": clone} {
			made, err := do(d)
			if err != nil {
				t.Fatalf("%s %s: %v", format, what, err)
			}
			if found, err := do(other); err != nil || found != made {
				t.Errorf("%s %s by another host when it is there: %s, not %s (err %v)", format, what, found, made, err)
			}
		}
	}
}

// TestCopyWithoutRoom is on a datastore that has none for a second volume, or
// that fills while the copy is made.
func TestCopyWithoutRoom(t *testing.T) {
	base := t.TempDir()
	if err := unix.Mount("atoll-test", base, "tmpfs", 0, "size=64m"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(base, unix.MNT_DETACH) })
	d, vms := openLive(t, testConfig(t, base, "node-a", storage.FormatRaw))
	v := mustCreate(t, d, "pvc-large", "thin", 40*mib)
	a, err := attach(d, v.ID)
	if err != nil {
		t.Fatal(err)
	}
	writeContent(t, a, 0, make32MiB())
	before := files(t, d)
	if _, err := d.Snapshot(t.Context(), v.ID, "snap", nil); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "free space") {
		t.Errorf("a copy that has no room: %v", err)
	}
	if n := vms.calls.Load(); n != 0 {
		t.Errorf("%d copies without room were begun", n)
	}
	small := mustCreate(t, d, "pvc-small", "thin", mib)
	if a, err = attach(d, small.ID); err != nil {
		t.Fatal(err)
	}
	writeContent(t, a, 0, []byte("precious"))
	vms.during = func(ctx context.Context, progress func(int64, int64)) error {
		if err := os.WriteFile(base+"/others", make([]byte, 20*mib), 0o600); err != nil {
			return err
		}
		progress(0, mib)
		<-ctx.Done()
		return ctx.Err()
	}
	if _, err := d.Snapshot(t.Context(), small.ID, "snap", nil); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "datastore is full") {
		t.Errorf("a copy whose datastore is filled by others: %v", err)
	}
	for _, f := range files(t, d) {
		if strings.Contains(f, "/s-") || strings.HasPrefix(f, snapshotsDir) {
			t.Errorf("%s is left; before there were %q", f, before)
		}
	}
}
