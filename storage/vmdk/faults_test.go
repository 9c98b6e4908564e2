package vmdk

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	cnstypes "github.com/vmware/govmomi/cns/types"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// A world is what a step of the life of a volume begins with.
type world struct {
	v        *vcenter
	name     string
	volume   storage.Volume
	snapshot storage.Snapshot
	holder   storage.Holder
}

// A step is one call, the methods of vCenter that it makes, what it does first,
// and what has to be so once it was repeated.
type step struct {
	name    string
	methods []string
	before  func(*testing.T, *Disks, *world) error
	do      func(context.Context, *Disks, *world) error
	after   func(*testing.T, *Disks, *world)
}

var steps = []step{
	{"create", []string{"CnsCreateVolume", "CnsQueryVolume"}, nil,
		func(ctx context.Context, d *Disks, w *world) error {
			_, err := d.Create(ctx, claim(w.name, 4<<20))
			return err
		},
		func(t *testing.T, d *Disks, w *world) { w.count(t, d, w.name, 1) }},
	{"expand", []string{"CnsExtendVolume"}, nil,
		func(ctx context.Context, d *Disks, w *world) error {
			_, err := d.Expand(ctx, w.volume.ID, 8<<20)
			return err
		},
		func(t *testing.T, d *Disks, w *world) {
			if v, err := d.Get(t.Context(), w.volume.ID); err != nil || v.Bytes != 8<<20 {
				t.Errorf("after Expand: %+v, %v", v, err)
			}
		}},
	{"snapshot", []string{"CnsCreateSnapshots", "CnsQuerySnapshots"}, nil,
		func(ctx context.Context, d *Disks, w *world) error {
			_, err := d.Snapshot(ctx, w.volume.ID, w.name, nil)
			return err
		},
		func(t *testing.T, d *Disks, w *world) { w.snapshots(t, d, 1) }},
	{"delete a snapshot", []string{"CnsDeleteSnapshots"},
		func(t *testing.T, d *Disks, w *world) (err error) {
			w.snapshot, err = d.Snapshot(t.Context(), w.volume.ID, w.name, nil)
			return err
		},
		func(ctx context.Context, d *Disks, w *world) error { return d.DeleteSnapshot(ctx, w.snapshot.ID) },
		func(t *testing.T, d *Disks, w *world) { w.snapshots(t, d, 0) }},
	{"clone", []string{"CnsCreateSnapshots", "CnsCreateVolume", "CnsExtendVolume", "CnsDeleteSnapshots"}, nil,
		func(ctx context.Context, d *Disks, w *world) error {
			c := claim(w.name+"-clone", 8<<20)
			c.Source = &storage.Source{VolumeID: w.volume.ID}
			_, err := d.Create(ctx, c)
			return err
		},
		func(t *testing.T, d *Disks, w *world) {
			w.count(t, d, w.name+"-clone", 1)
			w.snapshots(t, d, 0)
			all, err := d.query(t.Context(), cnstypes.CnsQueryFilter{Names: []string{w.name + "-clone"}})
			if err != nil || len(all) != 1 || all[0].mib != 8 {
				t.Errorf("the clone is %+v, %v", all, err)
			}
		}},
	{"attach", []string{"CnsAttachVolume", "CnsUpdateVolumeMetadata", "VslmRetrieveVStorageObjectAssociations"}, nil,
		func(ctx context.Context, d *Disks, w *world) error {
			_, err := d.Attach(ctx, w.volume.ID, w.holder, storage.AttachOptions{})
			return err
		},
		func(t *testing.T, d *Disks, w *world) { w.held(t, d, w.holder) }},
	{"detach", []string{"CnsDetachVolume", "CnsUpdateVolumeMetadata"},
		func(t *testing.T, d *Disks, w *world) error {
			_, err := d.Attach(t.Context(), w.volume.ID, w.holder, storage.AttachOptions{})
			return err
		},
		func(ctx context.Context, d *Disks, w *world) error { return d.Detach(ctx, w.volume.ID, w.holder) },
		func(t *testing.T, d *Disks, w *world) { w.held(t, d) }},
	{"delete", []string{"CnsDeleteVolume", "CnsQueryVolume", "VslmRetrieveVStorageObjectAssociations"}, nil,
		func(ctx context.Context, d *Disks, w *world) error { return d.Delete(ctx, w.volume.ID) },
		func(t *testing.T, d *Disks, w *world) { w.count(t, d, w.name, 0) }},
}

func (w *world) count(t *testing.T, d *Disks, name string, want int) {
	t.Helper()
	all, err := d.query(t.Context(), cnstypes.CnsQueryFilter{Names: []string{name}})
	if err != nil || len(all) != want {
		t.Errorf("%d disks are called %s, want %d (%v)", len(all), name, want, err)
	}
}

func (w *world) snapshots(t *testing.T, d *Disks, want int) {
	t.Helper()
	all, err := d.snapshotsOf(t.Context(), []*volume{{id: w.volume.ID}})
	if err != nil || len(all) != want {
		t.Errorf("%d snapshots, want %d (%v)", len(all), want, err)
	}
}

func (w *world) held(t *testing.T, d *Disks, want ...storage.Holder) {
	t.Helper()
	if hs, err := d.Holders(t.Context(), w.volume.ID); err != nil || !slices.Equal(hs, want) {
		t.Errorf("Holders = %v, %v; want %v", hs, err, want)
	}
	vm, err := d.findVM(t.Context(), w.holder.VM[:36])
	if err != nil {
		t.Fatal(err)
	}
	all, err := d.machines(t.Context(), []ref{vm})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, device := range all[vm].devices {
		if disk, ok := device.(*types.VirtualDisk); ok && disk.VDiskId != nil && disk.VDiskId.Id == w.volume.ID {
			n++
		}
	}
	if n != len(want) {
		t.Errorf("the disk is %d devices of the VM, want %d", n, len(want))
	}
}

var troubles = map[string]vcsim.Fault{
	"no answer, not done":      {Drop: true},
	"no answer, done":          {Drop: true, Late: true},
	"session dropped":          {Logout: true},
	"vCenter busy":             {Fault: &types.Timedout{}},
	"task times out":           {Task: true, Fault: &types.Timedout{}},
	"task times out, but done": {Task: true, Late: true, Fault: &types.Timedout{}},
	"task fails":               {Task: true, Fault: &types.SystemError{Reason: "disk library"}},
}

// TestFaults: each step fails in each way, and is repeated by another process:
// nothing is lost, made twice or attached twice.
func TestFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("starts some 150 processes' worth of sessions")
	}
	v := startVCenter(t)
	n := 0
	for _, s := range steps {
		for i, method := range s.methods {
			for _, trouble := range slices.Sorted(maps.Keys(troubles)) {
				n++
				f := troubles[trouble]
				f.Method, f.Times = method, 1
				if i > 0 && !f.Drop {
					continue // the first is the one that matters, and has a task
				}
				t.Run(s.name+"/"+method+"/"+trouble, func(t *testing.T) { s.fails(t, v, fmt.Sprint("pvc-", n), f) })
			}
		}
	}
}

func (s step) fails(t *testing.T, v *vcenter, name string, f vcsim.Fault) {
	d := v.open(t, v.options())
	w := &world{v: v, name: name, holder: v.vm(t, hostA, 1)}
	if s.name != "create" {
		var err error
		if w.volume, err = d.Create(t.Context(), claim(name, 4<<20)); err != nil {
			t.Fatal(err)
		}
	}
	if s.before != nil {
		if err := s.before(t, d, w); err != nil {
			t.Fatal(err)
		}
	}
	remove := v.Faults().Add(f)
	err := s.do(t.Context(), d, w)
	remove()
	if err != nil && !errdefs.IsUnavailable(err) {
		t.Errorf("%v, want ErrUnavailable: nothing is known", err)
	}
	next := v.open(t, v.options())
	if err := s.do(t.Context(), next, w); err != nil {
		t.Errorf("again: %v", err)
	}
	s.after(t, next, w)
	if s.name == "attach" { // leave the VM as it was
		if err := next.Detach(t.Context(), w.volume.ID, w.holder); err != nil {
			t.Error(err)
		}
	}
}

// TestKilledWhileTasksRun: a process is killed while vCenter makes its volume,
// its snapshot; the next one waits for that and makes no second.
func TestKilledWhileTasksRun(t *testing.T) {
	for _, s := range []step{steps[0], steps[2]} {
		t.Run(s.name, func(t *testing.T) {
			v := startVCenter(t)
			first := v.open(t, v.options())
			w := &world{v: v, name: "pvc-1", holder: v.vm(t, hostA, 1)}
			if s.name != "create" {
				var err error
				if w.volume, err = first.Create(t.Context(), claim("pvc-1", 4<<20)); err != nil {
					t.Fatal(err)
				}
			}
			hold := make(chan struct{})
			v.Faults().Add(vcsim.Fault{Method: s.methods[0], Times: 1, Hold: hold})
			ctx, kill := context.WithCancel(t.Context())
			died := make(chan error, 1)
			go func() { died <- s.do(ctx, first, w) }()
			for v.Faults().Calls()[s.methods[0]] == 0 || len(v.running(t)) == 0 {
				time.Sleep(time.Millisecond)
			}
			kill()
			if err := <-died; err == nil {
				t.Error("a call that was cut off succeeded")
			}
			next := v.open(t, v.options())
			done := make(chan error, 1)
			before := v.Faults().Calls()["RetrievePropertiesEx"]
			go func() { done <- s.do(t.Context(), next, w) }()
			for v.Faults().Calls()["RetrievePropertiesEx"] < before+2 { // it looks for tasks
				time.Sleep(time.Millisecond)
			}
			close(hold)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			s.after(t, next, w)
			if n := v.Faults().Calls()[s.methods[0]]; n != 1 {
				t.Errorf("%s was called %d times, want once", s.methods[0], n)
			}
		})
	}
}

// running are the tasks that run.
func (v *vcenter) running(t *testing.T) (all []string) {
	t.Helper()
	d, err := New(v.options())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.services.ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	if all, err = d.running(t.Context()); err != nil {
		t.Fatal(err)
	}
	return all
}

// TestUnknownIsNeverGone: where vCenter does not let us in, or shows less, no
// volume is taken for gone.
func TestUnknownIsNeverGone(t *testing.T) {
	for _, c := range []struct {
		name string
		on   func(*vcenter, *testing.T) ref
	}{
		{"everything hidden", func(v *vcenter, t *testing.T) ref { return v.admin(t).Client().ServiceContent.RootFolder }},
		{"datastore hidden", func(v *vcenter, t *testing.T) ref {
			d := v.open(t, v.options())
			return ref{Type: "Datastore", Value: d.anyStore(t).id}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := startVCenter(t)
			o := v.serve(t, privileges(t))
			d := v.open(t, o)
			cl := claim("pvc-1", 1<<20)
			cl.Policy = "gold"
			made, err := d.Create(t.Context(), cl)
			if err != nil {
				t.Fatal(err)
			}
			h := v.vm(t, hostA, 1)
			if _, err := d.Attach(t.Context(), made.ID, h, storage.AttachOptions{}); err != nil {
				t.Fatal(err)
			}
			const noAccess = -5
			admin := v.admin(t)
			_, err = methods.SetEntityPermissions(t.Context(), admin, &types.SetEntityPermissions{
				This: *admin.Client().ServiceContent.AuthorizationManager, Entity: c.on(v, t),
				Permission: []types.Permission{{Principal: "atoll@vsphere.local", RoleId: noAccess, Propagate: true}},
			})
			if err != nil {
				t.Fatal(err)
			}
			_, got := d.Get(t.Context(), made.ID)
			_, used := d.Used(t.Context(), made.ID)
			_, holders := d.Holders(t.Context(), made.ID)
			_, again := d.Create(t.Context(), cl)
			for what, err := range map[string]error{
				"Get": got, "Used": used, "Holders": holders, "Create": again,
				"Delete": d.Delete(t.Context(), made.ID), "Detach": d.Detach(t.Context(), made.ID, h),
			} {
				if err == nil || errdefs.IsNotFound(err) {
					t.Errorf("%s of what may not be seen: %v", what, err)
				}
			}
			if left := v.files(t); len(left) != 1 {
				t.Errorf("the files are %q", left)
			}
		})
	}
}
