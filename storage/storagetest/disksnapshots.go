package storagetest

import (
	"bytes"
	"slices"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/storage"
)

// content writes, if what is not nil, at the begin of a volume and reads it.
func (b Disks) content(t *testing.T, d storage.Disks, id string, what []byte, n int) []byte {
	t.Helper()
	if b.Write == nil {
		return nil
	}
	h := b.vm(t, hostA, 9)
	a := mustAttach(t, d, id, h, storage.AttachOptions{})
	if what != nil {
		b.Write(t, a, 0, what)
	}
	got := b.Read(t, a, 0, int64(n))
	mustDetach(t, d, id, h)
	return got
}

func (b Disks) wantContent(t *testing.T, d storage.Disks, id, want string) {
	t.Helper()
	if got := b.content(t, d, id, nil, len(want)); b.Read != nil && string(got) != want {
		t.Errorf("volume %s begins with %q, want %q", id, got, want)
	}
}

func testSnapshots(t *testing.T, b Disks) {
	ctx, d := t.Context(), b.Open(t, hostA)
	v := create(t, d, claim("pvc-1", b.Thin, 4*mib))
	other := create(t, d, claim("pvc-2", b.Thin, 4*mib))
	b.content(t, d, v.ID, []byte("first"), 0)
	s, err := d.Snapshot(ctx, v.ID, "snap-1", map[string]string{"who": "me"})
	if err != nil {
		t.Fatal(err)
	}
	if s.ID == "" || s.Name != "snap-1" || s.VolumeID != v.ID || s.Bytes != v.Bytes || !s.Ready || s.CreatedAt.IsZero() || s.Labels["who"] != "me" {
		t.Errorf("Snapshot = %+v", s)
	}
	if again, err := d.Snapshot(ctx, v.ID, "snap-1", nil); err != nil || again.ID != s.ID {
		t.Errorf("a second Snapshot = %+v, %v", again, err)
	}
	_, err = d.Snapshot(ctx, other.ID, "snap-1", nil)
	want(t, "the same name for another volume", err, errdefs.IsAlreadyExists, "snap-1")
	_, err = d.Snapshot(ctx, v.ID, "../snap", nil)
	want(t, "a path as name", err, errdefs.IsInvalidArgument)

	b.content(t, d, v.ID, []byte("later"), 0)
	s2, err := d.Snapshot(ctx, v.ID, "snap-2", nil)
	if err != nil {
		t.Fatal(err)
	}
	b.content(t, d, v.ID, []byte("today"), 0)
	if _, err := d.Snapshot(ctx, other.ID, "snap-3", nil); err != nil {
		t.Fatal(err)
	}
	both := []string{s.ID, s2.ID}
	slices.Sort(both)
	got, err := b.Open(t, hostA).ListSnapshots(ctx, v.ID)
	var ids []string
	for _, g := range got {
		ids = append(ids, g.ID)
	}
	if err != nil || !slices.Equal(ids, both) {
		t.Errorf("ListSnapshots = %q, %v; want %q", ids, err, both)
	}
	if all, err := d.ListSnapshots(ctx, ""); err != nil || len(all) != 3 {
		t.Errorf("ListSnapshots of all = %v, %v", all, err)
	}
	if one, err := d.GetSnapshot(ctx, s.ID); err != nil || one.ID != s.ID || !one.Ready {
		t.Errorf("GetSnapshot = %+v, %v", one, err)
	}
	b.restore(t, d, v, s, s2)
}

// restore makes volumes of the snapshots "first" and "later" of v, "today".
func (b Disks) restore(t *testing.T, d storage.Disks, v storage.Volume, s, s2 storage.Snapshot) {
	ctx := t.Context()
	c := claim("restored", b.Thin, 8*mib)
	c.Source = &storage.Source{SnapshotID: s.ID}
	r := create(t, d, c)
	if again := create(t, d, c); again.ID != r.ID || r.Bytes != 8*mib || r.Source == nil || *r.Source != *c.Source {
		t.Errorf("a volume of a snapshot = %+v, then %+v", r, again)
	}
	without := c
	without.Source = nil
	_, err := d.Create(ctx, without)
	want(t, "the same name without the source", err, errdefs.IsAlreadyExists)
	b.wantContent(t, d, r.ID, "first")
	b.content(t, d, r.ID, []byte("mine!"), 0)
	b.wantContent(t, d, v.ID, "today")

	c2 := claim("restored-2", b.Thin, 0)
	c2.Source = &storage.Source{SnapshotID: s.ID}
	r2 := create(t, d, c2)
	if r2.Bytes != s.Bytes {
		t.Errorf("without a size it is %d bytes large, want the snapshot's %d", r2.Bytes, s.Bytes)
	}
	b.wantContent(t, d, r2.ID, "first") // what was written to r is r's alone

	// Nothing that came of a volume needs it, or its snapshot.
	if err := d.Delete(ctx, v.ID); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := d.DeleteSnapshot(ctx, s.ID); err != nil {
			t.Fatal(err)
		}
	}
	_, err = d.GetSnapshot(ctx, s.ID)
	want(t, "GetSnapshot of what was deleted", err, errdefs.IsNotFound, s.ID)
	b.wantContent(t, d, r.ID, "mine!")
	b.wantContent(t, d, r2.ID, "first")
	c3 := claim("restored-3", b.Thin, 0)
	c3.Source = &storage.Source{SnapshotID: s2.ID}
	b.wantContent(t, d, create(t, d, c3).ID, "later")
}

func testClones(t *testing.T, b Disks) {
	ctx, d := t.Context(), b.Open(t, hostA)
	v := create(t, d, claim("pvc-1", b.Thin, 4*mib))
	b.content(t, d, v.ID, []byte("source"), 0)
	c := claim("clone", b.Thin, 8*mib)
	c.Source = &storage.Source{VolumeID: v.ID}
	w := create(t, d, c)
	b.wantContent(t, d, w.ID, "source")
	b.content(t, d, w.ID, []byte("cloned"), 0)
	b.wantContent(t, d, v.ID, "source")
	b.content(t, d, v.ID, []byte("parent"), 0)
	b.wantContent(t, d, w.ID, "cloned")
	if b.Read != nil {
		h := b.vm(t, hostA, 1)
		a := mustAttach(t, d, w.ID, h, storage.AttachOptions{})
		if got := b.Read(t, a, 4*mib, 4*mib); !bytes.Equal(got, make([]byte, 4*mib)) {
			t.Error("what a larger clone has beyond its source does not read as zeroes")
		}
		mustDetach(t, d, w.ID, h)
	}

	h := b.vm(t, hostA, 1)
	mustAttach(t, d, v.ID, h, storage.AttachOptions{})
	s, err := d.Snapshot(ctx, v.ID, "live", nil)
	if b.LiveSnapshots {
		if err != nil {
			t.Errorf("Snapshot of a volume in use: %v", err)
		}
	} else {
		want(t, "Snapshot of a volume in use", err, errdefs.IsFailedPrecondition)
		if all, err := d.ListSnapshots(ctx, ""); err != nil || len(all) != 0 {
			t.Errorf("a refused snapshot left %v, %v", all, err)
		}
	}
	mustDetach(t, d, v.ID, h)
	if b.LiveSnapshots {
		c := claim("of-live", b.Thin, 0)
		c.Source = &storage.Source{SnapshotID: s.ID}
		b.wantContent(t, d, create(t, d, c).ID, "parent")
	}
	if err := d.Delete(ctx, v.ID); err != nil {
		t.Error(err)
	}
	b.wantContent(t, d, w.ID, "cloned")
}

func testPolicies(t *testing.T, b Disks) {
	ctx, d := t.Context(), b.Open(t, hostA)
	ps, err := d.Policies(ctx)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]storage.Policy{}
	for i, p := range ps {
		if i > 0 && ps[i-1].Name >= p.Name {
			t.Errorf("Policies are not sorted: %s after %s", p.Name, ps[i-1].Name)
		}
		if len(p.Datastores) == 0 || len(p.Topology) == 0 {
			t.Errorf("policy %s is nowhere: %+v", p.Name, p)
		}
		found[p.Name] = p
	}
	for name, ok := range map[string]func(storage.Policy) bool{
		b.Thin:      func(p storage.Policy) bool { return !p.Thick && !p.Encrypted },
		b.Thick:     func(p storage.Policy) bool { return p.Thick },
		b.Encrypted: func(p storage.Policy) bool { return p.Encrypted },
		b.Shared:    func(p storage.Policy) bool { return p.Shared },
	} {
		if p, there := found[name]; name != "" && (!there || !ok(p)) {
			t.Errorf("policy %q is %+v, %v", name, p, there)
		}
	}
	c, err := d.Capacity(ctx, b.Thin, storage.Topology{})
	if err != nil || c.Total <= 0 || c.Available <= 0 || c.Available > c.Total || c.MaxVolume <= 0 || c.MaxVolume > c.Available {
		t.Errorf("Capacity = %+v, %v", c, err)
	}
	if c, err := d.Capacity(ctx, b.Thin, storage.Topology{Datastore: "never-was"}); err != nil || c != (storage.Capacity{}) {
		t.Errorf("Capacity where nothing is = %+v, %v", c, err)
	}
	_, err = d.Capacity(ctx, "gold-plated", storage.Topology{})
	want(t, "Capacity of an unknown policy", err, errdefs.IsNotFound, "gold-plated")
	if a, ok := d.(storage.Auditor); ok {
		v := create(t, d, claim("pvc-1", b.Thin, mib))
		if got, err := a.Compliance(ctx, v.ID); err != nil || got.State != storage.Compliant || got.Message != "" {
			t.Errorf("Compliance of a new volume = %+v, %v", got, err)
		}
		_, err := a.Compliance(ctx, "never-was")
		want(t, "Compliance of nothing", err, errdefs.IsNotFound)
	}
}

func testEncrypted(t *testing.T, b Disks) {
	if b.Encrypted == "" {
		t.Skip("the back end leaves encryption to what is below it")
	}
	ctx, d := t.Context(), b.Open(t, hostA)
	v := create(t, d, claim("pvc-1", b.Encrypted, 4*mib))
	b.content(t, d, v.ID, []byte("first"), 0)
	if b.Read != nil {
		if got := b.content(t, d, v.ID, nil, mib); !bytes.Equal(got[5:], make([]byte, mib-5)) {
			t.Error("the first MiB of a new encrypted volume does not read as zeroes")
		}
	}
	s, err := d.Snapshot(ctx, v.ID, "snap", nil)
	if err != nil {
		t.Fatal(err)
	}
	b.content(t, d, v.ID, []byte("later"), 0)
	c := claim("restored", b.Encrypted, 8*mib)
	c.Source = &storage.Source{SnapshotID: s.ID}
	b.wantContent(t, d, create(t, d, c).ID, "first")
	if _, err := d.Expand(ctx, v.ID, 8*mib); err != nil {
		t.Error(err)
	}
	b.wantContent(t, d, v.ID, "later")
	plain := claim("plain", b.Thin, 8*mib)
	plain.Source = c.Source
	_, err = d.Create(ctx, plain)
	want(t, "a plain volume of an encrypted snapshot", err, errdefs.IsInvalidArgument)
	if b.KeyedByClaim {
		b.testOwnKey(t, d)
	}
}

func (b Disks) testOwnKey(t *testing.T, d storage.Disks) {
	ctx, h := t.Context(), b.vm(t, hostA, 1)
	c := claim("own-key", b.Encrypted, 4*mib)
	c.Key = storage.Key("\x00\xff not only text, and long enough")
	v := create(t, d, c)
	_, err := d.Attach(ctx, v.ID, h, storage.AttachOptions{})
	want(t, "Attach without the key", err, errdefs.IsInvalidArgument, v.ID)
	o := storage.AttachOptions{Key: c.Key}
	a := mustAttach(t, d, v.ID, h, o)
	if b.Write != nil {
		b.Write(t, a, 4096, []byte("sealed"))
		if got := b.Read(t, a, 4096, 6); string(got) != "sealed" {
			t.Errorf("content = %q", got)
		}
	}
	mustDetach(t, d, v.ID, h)
	c.Key = storage.Key("short")
	_, err = d.Create(ctx, c)
	want(t, "a short key", err, errdefs.IsInvalidArgument)
}

func testThick(t *testing.T, b Disks) {
	if b.Thick == "" {
		t.Skip("no datastore of the back end can reserve space")
	}
	ctx, d := t.Context(), b.Open(t, hostA)
	v := create(t, d, claim("pvc-1", b.Thick, 8*mib))
	if used, err := d.Used(ctx, v.ID); err != nil || used < v.Bytes {
		t.Errorf("a thick volume of %d bytes uses %d, %v", v.Bytes, used, err)
	}
	if got, err := d.Expand(ctx, v.ID, 16*mib); err != nil || got.Bytes != 16*mib {
		t.Errorf("Expand = %+v, %v", got, err)
	}
	if used, err := d.Used(ctx, v.ID); err != nil || used < 16*mib {
		t.Errorf("expanded to 16 MiB it uses %d, %v", used, err)
	}
	h := b.vm(t, hostA, 1)
	if a := mustAttach(t, d, v.ID, h, storage.AttachOptions{}); !a.Thick {
		t.Error("its attachment does not say that it is thick: a discard would give its space away")
	}
	mustDetach(t, d, v.ID, h)
	b.content(t, d, v.ID, []byte("dense"), 0)
	c := claim("clone", b.Thick, 16*mib)
	c.Source = &storage.Source{VolumeID: v.ID}
	w := create(t, d, c)
	b.wantContent(t, d, w.ID, "dense")
	if used, err := d.Used(ctx, w.ID); err != nil || used < 16*mib {
		t.Errorf("a thick clone of 16 MiB uses %d, %v", used, err)
	}
	capacity, err := d.Capacity(ctx, b.Thick, storage.Topology{})
	if err != nil {
		t.Fatal(err)
	}
	if over := capacity.Available + 64*mib; over < capacity.Total {
		_, err = d.Create(ctx, claim("too-large", b.Thick, over))
		want(t, "more than is free", err, errdefs.IsResourceExhausted)
	}
}

func testShared(t *testing.T, b Disks) {
	if b.Shared == "" {
		t.Skip("the back end has no shared datastores")
	}
	ctx, d, e := t.Context(), b.Open(t, hostA), b.Open(t, hostB)
	v := create(t, d, claim("pvc-1", b.Shared, 4*mib))
	if v.At.Host != "" {
		t.Errorf("a shared volume is on host %q alone", v.At.Host)
	}
	if again := create(t, e, claim("pvc-1", b.Shared, 4*mib)); again.ID != v.ID {
		t.Errorf("the other host made %s of the same claim", again.ID)
	}
	one, two := b.vm(t, hostA, 1), b.vm(t, hostB, 2)
	mustAttach(t, d, v.ID, one, storage.AttachOptions{})
	_, err := e.Attach(ctx, v.ID, two, storage.AttachOptions{})
	want(t, "the other host's VM", err, errdefs.IsFailedPrecondition, one.VM, hostA)
	want(t, "Delete by the other host", e.Delete(ctx, v.ID), errdefs.IsFailedPrecondition, hostA)
	// A lost host stays the holder until somebody vouches that it is off.
	if freed, err := e.Fence(ctx, storage.Holder{Host: hostA}); err != nil || !slices.Equal(freed, []string{v.ID}) {
		t.Errorf("Fence = %q, %v", freed, err)
	}
	mustAttach(t, e, v.ID, two, storage.AttachOptions{})
	_, err = d.Attach(ctx, v.ID, one, storage.AttachOptions{})
	want(t, "the fenced host's VM", err, errdefs.IsFailedPrecondition, two.VM, hostB)
	if err := d.Detach(ctx, v.ID, one); err != nil {
		t.Error(err)
	}
	if hs, err := d.Holders(ctx, v.ID); err != nil || !slices.Equal(hs, []storage.Holder{two}) {
		t.Errorf("Holders after the fenced holder's Detach = %v, %v", hs, err)
	}
	mustDetach(t, e, v.ID, two)
}
