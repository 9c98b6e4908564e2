package namespaces

import (
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/vsphere"
	"github.com/openatoll/atoll/supervisor/namespaces/vc"
)

var oneZone = []vc.ZoneState{{Zone: vc.Zone{Name: "a"}, MHzPerCore: 1000}}

// synced is a namespace that was in step with a limit of 4 cores and 4 GiB.
func synced(change func(*v1alpha1.SupervisorNamespace)) *v1alpha1.SupervisorNamespace {
	ns := &v1alpha1.SupervisorNamespace{}
	ns.Generation = 3
	ns.Spec.CPU = &v1alpha1.CPUAllocation{Limit: q("4")}
	ns.Spec.Memory = &v1alpha1.MemoryAllocation{Limit: q("4Gi")}
	pool := desiredPools(&ns.Spec, oneZone)[0]
	ns.Status.Pools = []v1alpha1.PoolStatus{{Zone: "a", CPU: statusAllocation(pool.CPU), Memory: statusAllocation(pool.Memory)}}
	ns.Status.LastSynced = &v1alpha1.LastSynced{Generation: 3, CPU: ns.Spec.CPU.DeepCopy(), Memory: ns.Spec.Memory.DeepCopy()}
	if change != nil {
		change(ns)
	}
	return ns
}

// have is a pool with these limits, in its place.
func have(mhz, mib int64) vc.State {
	normal := vc.Shares{Level: vc.SharesNormal}
	p := vc.PoolState{Name: "shop", Path: "/x/shop", InPlace: true}
	p.Pool = vc.Pool{Zone: "a", CPU: vc.Allocation{Limit: mhz, Shares: normal}, Memory: vc.Allocation{Limit: mib, Shares: normal}}
	return vc.State{Pools: []vc.PoolState{p}, Folder: &vc.FolderState{Name: "shop", InPlace: true}}
}

// TestWhoChangedTheLimits is the heart of "vSphere wins for limits": only what
// neither the spec nor a change cut short explains is an administrator's.
func TestWhoChangedTheLimits(t *testing.T) {
	spec6 := func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.CPU.Limit, ns.Generation = q("6"), 4 }
	for _, tc := range []struct {
		name        string
		ns          *v1alpha1.SupervisorNamespace
		have        vc.State
		cpu, memory bool
	}{
		{"nobody", synced(nil), have(4000, 4096), false, false},
		{"an administrator, CPU", synced(nil), have(3000, 4096), true, false},
		{"an administrator, both", synced(nil), have(3000, vc.Unlimited), true, true},
		{"the spec, not applied yet", synced(spec6), have(4000, 4096), false, false},
		{"the spec's CPU and an administrator's memory", synced(spec6), have(4000, 1024), false, true},
		{"both, CPU: the spec's is the later that we know", synced(spec6), have(3000, 4096), false, false},
		{"the spec, cut short after the pool", synced(func(ns *v1alpha1.SupervisorNamespace) { spec6(ns); ns.Status.LastSynced = nil }), have(6000, 4096), false, false},
		{"the spec, cut short, then changed back", synced(func(ns *v1alpha1.SupervisorNamespace) { ns.Status.LastSynced = nil }), have(6000, 4096), false, false},
		{"another clock of the hosts", synced(func(ns *v1alpha1.SupervisorNamespace) { ns.Status.Pools[0].CPU.Limit = 8000 }), have(8000, 4096), false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			want := vc.Namespace{Ref: vc.Ref{Name: "shop"}, Pools: desiredPools(&tc.ns.Spec, oneZone)}
			d := findDrift(tc.ns, vc.Diff(want, tc.have))
			if d.cpu != tc.cpu || d.memory != tc.memory {
				t.Fatalf("CPU %v memory %v, want %v %v", d.cpu, d.memory, tc.cpu, tc.memory)
			}
			if len(d.structure) != 0 {
				t.Errorf("structure %v", d.structure)
			}
			if !tc.cpu && !tc.memory {
				return
			}
			spec := tc.ns.Spec.DeepCopy()
			if !adoptLimits(spec, d, tc.have, oneZone) {
				t.Fatal("nothing to adopt")
			}
			// What was adopted asks for what is there.
			got := desiredPools(spec, oneZone)[0]
			if tc.cpu && got.CPU != tc.have.Pools[0].CPU || tc.memory && got.Memory != tc.have.Pools[0].Memory {
				t.Errorf("adopted %+v, there is %+v", got, tc.have.Pools[0].Pool)
			}
		})
	}
}

func TestAdoptOverZones(t *testing.T) {
	zones := []vc.ZoneState{{Zone: vc.Zone{Name: "a"}, MHzPerCore: 2000}, {Zone: vc.Zone{Name: "b"}, MHzPerCore: 1000}}
	state := have(3000, 1024)
	second := state.Pools[0]
	second.Zone, second.CPU.Limit, second.CPU.Reservation, second.Memory.Limit = "b", 500, 500, 512
	state.Pools = append(state.Pools, second)
	spec := &v1alpha1.SupervisorNamespaceSpec{}
	if !adoptLimits(spec, drift{cpu: true, memory: true}, state, zones) {
		t.Fatal("nothing adopted")
	}
	if spec.CPU.Limit.Cmp(*q("2")) != 0 || spec.CPU.Reservation.Cmp(*q("500m")) != 0 || spec.Memory.Limit.Cmp(*q("1536Mi")) != 0 {
		t.Errorf("CPU %v of %v, memory %v", spec.CPU.Limit, spec.CPU.Reservation, spec.Memory.Limit)
	}
	state.Pools[1].CPU.Limit = vc.Unlimited
	adoptLimits(spec, drift{cpu: true}, state, zones)
	if spec.CPU.Limit != nil {
		t.Errorf("one pool without a limit: %v", spec.CPU.Limit)
	}
}

func TestStructureDriftNeedsAnUnchangedSpec(t *testing.T) {
	diffs := []vc.Drift{{Field: vc.FieldName, Message: "renamed"}}
	if d := findDrift(synced(nil), diffs); len(d.structure) != 1 {
		t.Errorf("unchanged spec: %v", d)
	}
	if d := findDrift(synced(func(ns *v1alpha1.SupervisorNamespace) { ns.Generation++ }), diffs); !d.none() {
		t.Errorf("changed spec: %v", d)
	}
}

func TestAdoptStructure(t *testing.T) {
	spec := &v1alpha1.SupervisorNamespaceSpec{}
	spec.Access = []v1alpha1.AccessEntry{
		{Kind: v1alpha1.UserSubject, Name: "Ada", Role: v1alpha1.RoleView},
		{Kind: v1alpha1.UserSubject, Name: "local", Domain: "-", Role: v1alpha1.RoleEdit},
	}
	state := have(1, 1)
	state.Access = []vc.Access{{Subject: "ada", Domain: "vsphere.local", Role: vc.RoleOwner}, {Subject: "devs", Domain: "corp", Group: true, Role: vc.RoleView}}
	d := drift{structure: []vc.Drift{{Field: vc.FieldAccess}, {Field: vc.FieldDescription, Have: "new"}}}
	if !adoptStructure(spec, d, state, "vsphere.local") {
		t.Fatal("nothing adopted")
	}
	want := []v1alpha1.AccessEntry{
		{Kind: v1alpha1.UserSubject, Name: "local", Domain: "-", Role: v1alpha1.RoleEdit},
		{Kind: v1alpha1.UserSubject, Name: "Ada", Role: v1alpha1.RoleOwner},
		{Kind: v1alpha1.GroupSubject, Name: "devs", Domain: "corp", Role: v1alpha1.RoleView},
	}
	if spec.Description != "new" || !equality.Semantic.DeepEqual(spec.Access, want) {
		t.Errorf("description %q, access %+v", spec.Description, spec.Access)
	}
	// Of pool and folder, the one that is not as the spec has it is the one that
	// was changed; two that are not tell nothing.
	spec.Access = spec.Access[:1]
	uneven := state
	uneven.AccessUneven = [][]vc.Access{nil, {{Subject: "ada", Domain: "vsphere.local", Role: vc.RoleView}}}
	if !adoptStructure(spec, drift{structure: d.structure[:1]}, uneven, "vsphere.local") || len(spec.Access) != 2 || spec.Access[1].Name != "ada" {
		t.Errorf("of one object's permissions: %+v", spec.Access)
	}
	uneven.AccessUneven = [][]vc.Access{nil, {{Subject: "eve", Domain: "vsphere.local", Role: vc.RoleView}}}
	if adoptStructure(spec, drift{structure: d.structure[:1]}, uneven, "vsphere.local") {
		t.Errorf("of two objects' permissions: %+v", spec.Access)
	}
	state.Access[0].Role = "Administrator"
	before := spec.DeepCopy()
	adoptStructure(spec, drift{structure: d.structure[:1]}, state, "vsphere.local")
	if !equality.Semantic.DeepEqual(before, spec) {
		t.Error("a role that no access list has was adopted")
	}
}

// TestLimitBelowUse: running VMs are not starved.
func TestLimitBelowUse(t *testing.T) {
	ns := synced(func(ns *v1alpha1.SupervisorNamespace) {
		ns.Spec.Memory.Limit = q("1Gi")
		ns.Status.Usage = &v1alpha1.Usage{Memory: q("3Gi"), CPU: q("1")}
	})
	p := &pass{reconciler: &reconciler{}, ns: ns, sup: &v1alpha1.Supervisor{}}
	want := p.desired(oneZone, have(4000, 4096))
	if got := want.Pools[0].Memory.Limit; got != 4096 {
		t.Errorf("the pool would get %d MiB while 3072 are used", got)
	}
	if len(p.problems) != 1 || p.problems[0].reason != v1alpha1.ReasonLimitBelowUse {
		t.Errorf("problems %v", p.problems)
	}
	ns.Status.Usage.Memory = q("1Gi")
	p.problems = nil
	if want := p.desired(oneZone, have(4000, 4096)); want.Pools[0].Memory.Limit != 1024 || len(p.problems) != 0 {
		t.Errorf("use fell: %d MiB, %v", want.Pools[0].Memory.Limit, p.problems)
	}
}

func TestReasons(t *testing.T) {
	part := func(f vc.Field, class error) error {
		return fmt.Errorf("x: %w", &vc.PartError{Field: f, Err: fmt.Errorf("y: %w", class)})
	}
	for _, tc := range []struct {
		err  error
		want string
	}{
		{part(vc.FieldAccess, errdefs.ErrInvalidArgument), v1alpha1.ReasonUnknownUser},
		{part(vc.FieldTag, errdefs.ErrInvalidArgument), v1alpha1.ReasonUnknownTag},
		{part(vc.FieldAccess, errdefs.ErrFailedPrecondition), v1alpha1.ReasonAccessRefused},
		{part(vc.FieldMemory, errdefs.ErrFailedPrecondition), v1alpha1.ReasonReservationTooLarge},
		{part(vc.FieldAccess, errdefs.ErrPermissionDenied), v1alpha1.ReasonPermissionDenied},
		{errdefs.ErrAlreadyExists, v1alpha1.ReasonPoolNotOurs},
		{errdefs.ErrUnknown, v1alpha1.ReasonTaskFailed},
	} {
		if got := ensureReason(tc.err); got != tc.want {
			t.Errorf("%v: %s, want %s", tc.err, got, tc.want)
		}
	}
	for _, tc := range []struct {
		err  error
		want string
	}{
		{fmt.Errorf("x: %w", vsphere.ErrLogin), v1alpha1.ReasonCredentialsInvalid},
		{fmt.Errorf("x: %w", vsphere.ErrUntrusted), v1alpha1.ReasonCertificateNotTrusted},
		{errdefs.ErrUnavailable, v1alpha1.ReasonVCenterUnreachable},
	} {
		if got := vcenterReason(tc.err); got != tc.want {
			t.Errorf("%v: %s, want %s", tc.err, got, tc.want)
		}
	}
	both := errors.Join(errdefs.ErrAlreadyExists, errors.Join(errdefs.ErrUnknown, errdefs.ErrAborted))
	if got := flatten(both); len(got) != 3 {
		t.Errorf("flattened to %v", got)
	}
	if got := flatten(fmt.Errorf("a %w b %w", errdefs.ErrUnknown, errdefs.ErrAborted)); len(got) != 1 {
		t.Errorf("one error with two classes became %v", got)
	}
}

func TestQuotaThereAndBack(t *testing.T) {
	n, m := int64(5), int64(0)
	spec := &v1alpha1.SupervisorNamespaceSpec{NamespaceSettings: v1alpha1.NamespaceSettings{
		CPU: &v1alpha1.CPUAllocation{Limit: q("4"), Reservation: q("1")}, Memory: &v1alpha1.MemoryAllocation{Limit: q("4Gi")},
		ObjectCounts:      &v1alpha1.ObjectCounts{Pods: &n, CronJobs: &m},
		StoragePolicies:   []v1alpha1.StoragePolicyLimit{{Name: "gold", Limit: q("1Gi")}, {Name: "free"}},
		ContainerDefaults: &v1alpha1.ContainerDefaults{CPULimit: q("1"), MemoryRequest: q("64Mi")},
	}}
	hard := quotaHard(spec)
	if len(hard) != 4 || hard.Name("count/cronjobs.batch", "").Value() != 0 || hard.Pods().Value() != 5 {
		t.Errorf("hard %v", hard)
	}
	got := spec.DeepCopy()
	adoptQuota(got, hard)
	adoptStorageQuota(got, storageHard(spec))
	adoptLimitRange(got, []corev1.LimitRangeItem{*limitRangeItem(spec.ContainerDefaults)})
	if !equality.Semantic.DeepEqual(got, spec) {
		t.Errorf("what was not edited changes the spec: %+v", got)
	}
	hard[corev1.ResourcePods] = *q("7")
	delete(hard, corev1.ResourceLimitsMemory)
	adoptQuota(got, hard)
	if *got.ObjectCounts.Pods != 7 || got.Memory.Limit != nil || got.CPU.Limit.Cmp(*q("4")) != 0 {
		t.Errorf("edited: %+v", got)
	}
	if appliedDigest(corev1.ResourceList{"cpu": *q("1000m")}) != appliedDigest(corev1.ResourceList{"cpu": *q("1")}) {
		t.Error("1000m is not 1")
	}
}
