package storagetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/storage"
)

// Disks is a back end that storagetest judges: TestDisks does.
type Disks struct {
	// Open opens the back end as the host of that name, on whatever an earlier
	// Open of this test left. Nothing is closed before: so a process that was
	// killed is followed by the next.
	Open func(t *testing.T, host string) storage.Disks
	// Thin is a policy that is neither thick nor encrypted, of datastores with
	// room for at least 128 MiB. The others are empty where there is none like
	// that. Shared is one whose volumes two hosts can open.
	Thin, Thick, Encrypted, Shared string
	// KeyedByClaim: claims of Encrypted may bring their own key.
	KeyedByClaim bool
	// Write and Read act on the content of a volume as a guest would that has
	// it by a, and leave it closed. nil if no content can be reached: then what
	// snapshots hold is not judged.
	Write func(t *testing.T, a storage.Attachment, at int64, data []byte)
	Read  func(t *testing.T, a storage.Attachment, at, n int64) []byte
	// VM gives the ID of a VM that volumes can be attached to, on a host, the
	// i-th; nil: any name will do.
	VM func(t *testing.T, host string, i int) string
	// LiveSnapshots: volumes in use can be snapshotted.
	LiveSnapshots bool
}

const (
	mib   = 1 << 20
	hostA = "node-a"
	hostB = "node-b"
)

// TestDisks is what every storage.Disks must do. Each part begins with a back
// end without volumes, which b.Open gives to a test of its own.
func TestDisks(t *testing.T, b Disks) {
	for _, part := range []struct {
		name string
		test func(*testing.T, Disks)
	}{
		{"Create", testCreate}, {"Refusals", testRefusals}, {"Concurrency", testConcurrency}, {"Attach", testAttach}, {"Fence", testFence},
		{"Expand", testExpand}, {"Snapshots", testSnapshots}, {"Clones", testClones}, {"Policies", testPolicies}, {"Encrypted", testEncrypted},
		{"Thick", testThick}, {"Shared", testShared},
	} {
		t.Run(part.name, func(t *testing.T) { part.test(t, b) })
	}
}

func (b Disks) vm(t *testing.T, host string, i int) storage.Holder {
	if b.VM != nil {
		return storage.Holder{VM: b.VM(t, host, i), Host: host}
	}
	return storage.Holder{VM: fmt.Sprintf("5d2f6c0e-0001-4000-8000-00000000000%d_0", i), Host: host}
}

func claim(name, policy string, bytes int64) storage.Claim {
	return storage.Claim{Name: name, Bytes: bytes, Policy: policy, Labels: map[string]string{
		storage.LabelNamespace: "team-a", storage.LabelPVC: "data", storage.LabelPV: name,
	}}
}

func create(t *testing.T, d storage.Disks, c storage.Claim) storage.Volume {
	t.Helper()
	v, err := d.Create(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func mustAttach(t *testing.T, d storage.Disks, id string, h storage.Holder, o storage.AttachOptions) storage.Attachment {
	t.Helper()
	a, err := d.Attach(t.Context(), id, h, o)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func mustDetach(t *testing.T, d storage.Disks, id string, h storage.Holder) {
	t.Helper()
	if err := d.Detach(t.Context(), id, h); err != nil {
		t.Fatal(err)
	}
}

// want checks an error's class, and that it names what it is about.
func want(t *testing.T, what string, err error, is func(error) bool, names ...string) {
	t.Helper()
	if !is(err) {
		t.Errorf("%s: %v, which is of the wrong class", what, err)
		return
	}
	for _, n := range names {
		if !strings.Contains(err.Error(), n) {
			t.Errorf("%s: %q does not name %s", what, err, n)
		}
	}
}

func volumeIDs(t *testing.T, d storage.Disks) []string {
	t.Helper()
	vs, err := d.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, v := range vs {
		out = append(out, v.ID)
	}
	if !slices.IsSorted(out) {
		t.Errorf("List is not sorted: %q", out)
	}
	return out
}

func testCreate(t *testing.T, b Disks) {
	ctx, d := t.Context(), b.Open(t, hostA)
	c := claim("pvc-1", b.Thin, 8*mib-1)
	v := create(t, d, c)
	if v.ID == "" || len(v.ID) > 128 || v.Name != c.Name || v.Bytes != 8*mib || v.Policy != b.Thin || v.At.Datastore == "" || v.Datastore == "" || v.CreatedAt.IsZero() {
		t.Errorf("Create = %+v", v)
	}
	if v.Labels[storage.LabelPVC] != "data" {
		t.Errorf("labels are %v", v.Labels)
	}
	if again := create(t, d, c); again.ID != v.ID || again.Bytes != v.Bytes {
		t.Errorf("a second Create = %+v, want %+v", again, v)
	}
	smaller := c
	smaller.Bytes = 1
	if again := create(t, d, smaller); again.ID != v.ID {
		t.Errorf("a smaller claim of the same name made %s", again.ID)
	}
	larger := c
	larger.Bytes = 64 * mib
	_, err := d.Create(ctx, larger)
	want(t, "a larger claim of the same name", err, errdefs.IsAlreadyExists, c.Name)
	got, err := d.Get(ctx, v.ID)
	if err != nil || got.ID != v.ID || got.Bytes != v.Bytes || got.Name != v.Name {
		t.Errorf("Get = %+v, %v", got, err)
	}
	w := create(t, d, claim("pvc-2", b.Thin, mib))
	both := []string{v.ID, w.ID}
	slices.Sort(both)
	if ids := volumeIDs(t, d); !slices.Equal(ids, both) {
		t.Errorf("List = %q, want %q", ids, both)
	}
	used, err := d.Used(ctx, v.ID)
	if err != nil || used < 0 || used > v.Bytes {
		t.Errorf("a new thin volume of %d bytes uses %d, %v", v.Bytes, used, err)
	}
	if ids := volumeIDs(t, b.Open(t, hostA)); !slices.Equal(ids, both) {
		t.Errorf("after it was opened again: List = %q, want %q", ids, both)
	}
	for range 2 {
		if err := d.Delete(ctx, v.ID); err != nil {
			t.Errorf("Delete: %v", err)
		}
	}
	_, err = d.Get(ctx, v.ID)
	want(t, "Get of what was deleted", err, errdefs.IsNotFound, v.ID)
	if ids := volumeIDs(t, d); !slices.Equal(ids, []string{w.ID}) {
		t.Errorf("after Delete: List = %q", ids)
	}
	if b.Read != nil {
		h := b.vm(t, hostA, 1)
		a := mustAttach(t, d, w.ID, h, storage.AttachOptions{})
		if got := b.Read(t, a, 0, mib); !bytes.Equal(got, make([]byte, mib)) {
			t.Error("a new volume does not read as zeroes")
		}
		mustDetach(t, d, w.ID, h)
	}
}

func testRefusals(t *testing.T, b Disks) {
	ctx, d := t.Context(), b.Open(t, hostA)
	capacity, err := d.Capacity(ctx, b.Thin, storage.Topology{})
	if err != nil {
		t.Fatal(err)
	}
	v := create(t, d, claim("pvc-1", b.Thin, 4*mib))
	for what, c := range map[string]struct {
		change func(*storage.Claim)
		is     func(error) bool
	}{
		"no name":              {func(c *storage.Claim) { c.Name = "" }, errdefs.IsInvalidArgument},
		"a path as name":       {func(c *storage.Claim) { c.Name = "../../etc/passwd" }, errdefs.IsInvalidArgument},
		"a long name":          {func(c *storage.Claim) { c.Name = strings.Repeat("a", 64) }, errdefs.IsInvalidArgument},
		"no size":              {func(c *storage.Claim) { c.Bytes = 0 }, errdefs.IsInvalidArgument},
		"less than nothing":    {func(c *storage.Claim) { c.Bytes = -1 }, errdefs.IsInvalidArgument},
		"more than there is":   {func(c *storage.Claim) { c.Bytes = capacity.Total + mib }, errdefs.IsOutOfRange},
		"an unknown policy":    {func(c *storage.Claim) { c.Policy = "gold-plated" }, errdefs.IsNotFound},
		"a key for no lock":    {func(c *storage.Claim) { c.Key = storage.Key("0123456789abcdef") }, errdefs.IsInvalidArgument},
		"two sources":          {func(c *storage.Claim) { c.Source = &storage.Source{SnapshotID: "a", VolumeID: v.ID} }, errdefs.IsInvalidArgument},
		"a source of nothing":  {func(c *storage.Claim) { c.Source = &storage.Source{} }, errdefs.IsInvalidArgument},
		"an unknown snapshot":  {func(c *storage.Claim) { c.Source = &storage.Source{SnapshotID: "never-was"} }, errdefs.IsNotFound},
		"an unknown volume":    {func(c *storage.Claim) { c.Source = &storage.Source{VolumeID: "never-was"} }, errdefs.IsNotFound},
		"less than its source": {func(c *storage.Claim) { c.Bytes, c.Source = mib, &storage.Source{VolumeID: v.ID} }, errdefs.IsOutOfRange},
		"an unknown place":     {func(c *storage.Claim) { c.At = []storage.Topology{{Datastore: "never-was"}} }, errdefs.IsInvalidArgument},
	} {
		cl := claim("refused", b.Thin, 4*mib)
		c.change(&cl)
		_, err := d.Create(ctx, cl)
		want(t, "a claim with "+what, err, c.is)
	}
	if ids := volumeIDs(t, d); !slices.Equal(ids, []string{v.ID}) {
		t.Errorf("refused claims left %q", ids)
	}
	h := b.vm(t, hostA, 1)
	for _, id := range []string{"", "never-was", "../../etc/passwd", v.ID + "x"} {
		_, err := d.Get(ctx, id)
		want(t, "Get of "+id, err, errdefs.IsNotFound)
		_, err = d.Expand(ctx, id, 8*mib)
		want(t, "Expand of "+id, err, errdefs.IsNotFound)
		_, err = d.Attach(ctx, id, h, storage.AttachOptions{})
		want(t, "Attach of "+id, err, errdefs.IsNotFound)
		_, err = d.Snapshot(ctx, id, "s", nil)
		want(t, "Snapshot of "+id, err, errdefs.IsNotFound)
		_, err = d.GetSnapshot(ctx, id)
		want(t, "GetSnapshot of "+id, err, errdefs.IsNotFound)
		_, err = d.Used(ctx, id)
		want(t, "Used of "+id, err, errdefs.IsNotFound)
		_, err = d.Holders(ctx, id)
		want(t, "Holders of "+id, err, errdefs.IsNotFound)
		for what, err := range map[string]error{"Delete": d.Delete(ctx, id), "DeleteSnapshot": d.DeleteSnapshot(ctx, id), "Detach": d.Detach(ctx, id, h)} {
			if err != nil {
				t.Errorf("%s of %q, which is gone: %v", what, id, err)
			}
		}
	}
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := d.Create(gone, claim("cancelled", b.Thin, 4*mib)); err != nil && !errors.Is(err, context.Canceled) && !errdefs.IsUnavailable(err) {
		t.Errorf("Create without time: %v", err)
	}
	create(t, d, claim("cancelled", b.Thin, 4*mib))
}

func testConcurrency(t *testing.T, b Disks) {
	ctx, d, other := t.Context(), b.Open(t, hostA), b.Open(t, hostA)
	var wg sync.WaitGroup
	ids := make([]string, 8)
	for i := range ids {
		wg.Go(func() {
			by := d
			if i%2 == 1 {
				by = other
			}
			v, err := by.Create(ctx, claim("same", b.Thin, 4*mib))
			if err != nil {
				t.Error(err)
			}
			ids[i] = v.ID
			if _, err := by.Create(ctx, claim(fmt.Sprintf("own-%d", i), b.Thin, mib)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(slices.Compact(ids)) != 1 {
		t.Fatalf("one name gave %q", ids)
	}
	if got := volumeIDs(t, d); len(got) != 9 {
		t.Errorf("%d volumes, want 9: %q", len(got), got)
	}
	// Of many who want it one gets it.
	var mu sync.Mutex
	var winners []storage.Holder
	for i := range 6 {
		h := b.vm(t, hostA, i+1)
		wg.Go(func() {
			by := d
			if i%2 == 1 {
				by = other
			}
			_, err := by.Attach(ctx, ids[0], h, storage.AttachOptions{})
			if err == nil {
				mu.Lock()
				winners = append(winners, h)
				mu.Unlock()
			} else if !errdefs.IsFailedPrecondition(err) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(winners) != 1 {
		t.Fatalf("%d VMs have it: %v", len(winners), winners)
	}
	if hs, err := d.Holders(ctx, ids[0]); err != nil || !slices.Equal(hs, winners) {
		t.Errorf("Holders = %v, %v; want %v", hs, err, winners)
	}
	mustDetach(t, d, ids[0], winners[0])
	for range 4 {
		wg.Go(func() {
			if err := d.Delete(ctx, ids[0]); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func testAttach(t *testing.T, b Disks) {
	ctx, d := t.Context(), b.Open(t, hostA)
	v := create(t, d, claim("pvc-1", b.Thin, 4*mib))
	h, other := b.vm(t, hostA, 1), b.vm(t, hostA, 2)
	if hs, err := d.Holders(ctx, v.ID); err != nil || len(hs) != 0 {
		t.Errorf("Holders of a new volume = %v, %v", hs, err)
	}
	a := mustAttach(t, d, v.ID, h, storage.AttachOptions{})
	if a.VolumeID != v.ID || a.DiskID != storage.DiskID(v.ID) || a.Path == "" || a.Format != v.Format || a.Bytes != v.Bytes || a.ReadOnly {
		t.Errorf("Attach = %+v", a)
	}
	if again := mustAttach(t, d, v.ID, h, storage.AttachOptions{}); again.Path != a.Path {
		t.Errorf("the same holder got %s and then %s", a.Path, again.Path)
	}
	_, err := d.Attach(ctx, v.ID, h, storage.AttachOptions{ReadOnly: true})
	want(t, "the same holder, read-only", err, errdefs.IsFailedPrecondition)
	_, err = d.Attach(ctx, v.ID, other, storage.AttachOptions{})
	want(t, "another holder", err, errdefs.IsFailedPrecondition, v.ID, h.VM, h.Host)
	var held *storage.HeldError
	if !errors.As(err, &held) || held.Holder != h {
		t.Errorf("%v names the holder %+v", err, held)
	}
	_, err = b.Open(t, hostA).Attach(ctx, v.ID, other, storage.AttachOptions{})
	want(t, "another holder, after a restart", err, errdefs.IsFailedPrecondition, h.VM)
	want(t, "Delete of what is attached", d.Delete(ctx, v.ID), errdefs.IsFailedPrecondition, h.VM)
	if err := d.Detach(ctx, v.ID, other); err != nil {
		t.Errorf("Detach of who has nothing: %v", err)
	}
	if hs, err := d.Holders(ctx, v.ID); err != nil || !slices.Equal(hs, []storage.Holder{h}) {
		t.Errorf("Holders = %v, %v; want %v", hs, err, h)
	}
	for range 2 {
		mustDetach(t, d, v.ID, h)
	}
	a = mustAttach(t, d, v.ID, other, storage.AttachOptions{ReadOnly: true})
	if !a.ReadOnly {
		t.Error("a read-only attachment is not")
	}
	mustDetach(t, d, v.ID, other)
	_, err = d.Attach(ctx, v.ID, storage.Holder{Host: hostA}, storage.AttachOptions{})
	want(t, "a holder without a VM", err, errdefs.IsInvalidArgument)
	if err := d.Delete(ctx, v.ID); err != nil {
		t.Error(err)
	}
}

func testFence(t *testing.T, b Disks) {
	ctx, d := t.Context(), b.Open(t, hostA)
	one, two := b.vm(t, hostA, 1), b.vm(t, hostA, 2)
	var of []string
	for i, h := range []storage.Holder{one, one, two} {
		v := create(t, d, claim(fmt.Sprintf("pvc-%d", i), b.Thin, mib))
		mustAttach(t, d, v.ID, h, storage.AttachOptions{})
		of = append(of, v.ID)
	}
	firsts := slices.Sorted(slices.Values(of[:2]))
	freed, err := d.Fence(ctx, one)
	if err != nil || !slices.Equal(freed, firsts) {
		t.Errorf("Fence(%v) = %q, %v; want %q", one, freed, err, firsts)
	}
	if freed, err := d.Fence(ctx, one); err != nil || len(freed) != 0 {
		t.Errorf("a second Fence = %q, %v", freed, err)
	}
	mustAttach(t, d, of[0], two, storage.AttachOptions{})
	freed, err = d.Fence(ctx, storage.Holder{Host: hostA})
	if err != nil || len(freed) != 2 {
		t.Errorf("Fence of a whole host = %q, %v", freed, err)
	}
	for _, id := range of {
		if err := d.Delete(ctx, id); err != nil {
			t.Error(err)
		}
	}
	_, err = d.Fence(ctx, storage.Holder{VM: one.VM})
	want(t, "Fence without a host", err, errdefs.IsInvalidArgument)
}

func testExpand(t *testing.T, b Disks) {
	ctx, d := t.Context(), b.Open(t, hostA)
	v := create(t, d, claim("pvc-1", b.Thin, 4*mib))
	h := b.vm(t, hostA, 1)
	marker := []byte("kept across the expansion")
	write := func(at int64) {
		if b.Write != nil {
			a := mustAttach(t, d, v.ID, h, storage.AttachOptions{})
			b.Write(t, a, at, marker)
			mustDetach(t, d, v.ID, h)
		}
	}
	write(0)
	for _, size := range []int64{8*mib - 5, 8 * mib, 2 * mib} {
		got, err := d.Expand(ctx, v.ID, size)
		if err != nil || got.Bytes != 8*mib {
			t.Errorf("Expand to %d = %d bytes, %v", size, got.Bytes, err)
		}
	}
	capacity, err := d.Capacity(ctx, b.Thin, storage.Topology{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = d.Expand(ctx, v.ID, capacity.Total+8*mib)
	want(t, "Expand beyond the datastore", err, errdefs.IsOutOfRange)
	mustAttach(t, d, v.ID, h, storage.AttachOptions{})
	if got, err := d.Expand(ctx, v.ID, 16*mib); err != nil || got.Bytes != 16*mib {
		t.Errorf("Expand of an attached volume = %d bytes, %v", got.Bytes, err)
	}
	mustDetach(t, d, v.ID, h)
	if got, err := b.Open(t, hostA).Get(ctx, v.ID); err != nil || got.Bytes != 16*mib {
		t.Errorf("Get after it was opened again = %d bytes, %v", got.Bytes, err)
	}
	a := mustAttach(t, d, v.ID, h, storage.AttachOptions{})
	if a.Bytes != 16*mib {
		t.Errorf("Attach = %d bytes", a.Bytes)
	}
	if b.Read != nil {
		if got := b.Read(t, a, 0, int64(len(marker))); !bytes.Equal(got, marker) {
			t.Errorf("content after Expand = %q", got)
		}
		if got := b.Read(t, a, 16*mib-4096, 4096); !bytes.Equal(got, make([]byte, 4096)) {
			t.Error("what was added does not read as zeroes")
		}
	}
	mustDetach(t, d, v.ID, h)
	write(16*mib - 512)
}
