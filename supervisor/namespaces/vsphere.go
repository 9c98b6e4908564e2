package namespaces

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/vsphere"
	"github.com/openatoll/atoll/supervisor/namespaces/vc"
)

// syncVSphere makes pools, folder and permissions as the spec has them, or the
// spec as an administrator has them, when changed is true and the pass is over.
// Without an answer from vCenter, what the status has stays.
func (p *pass) syncVSphere(ctx context.Context) (changed bool, err error) {
	vcenter, err := p.conn.client()
	if err != nil {
		p.vcenterProblem(err)
		return false, nil
	}
	all, err := vcenter.Zones()
	if err != nil {
		p.zonesProblem(err)
		return false, nil
	}
	zones, ok := p.zones(all)
	if !ok {
		return false, nil
	}
	state, err := vcenter.State(p.ref())
	if err != nil {
		p.vcenterProblem(err)
		return false, nil
	}
	want := p.desired(zones, state)
	diffs := vc.Diff(want, state)
	if d := findDrift(p.ns, diffs); !d.none() {
		if changed, err := p.drifted(ctx, d, state, zones); changed || err != nil {
			return changed, err
		}
	}
	if slices.ContainsFunc(diffs, vc.Drift.Limits) && p.ns.Status.LastSynced != nil {
		// Whoever finds the change half done is to finish it.
		p.ns.Status.LastSynced = nil
		if err := p.writeStatus(ctx); err != nil {
			return false, err
		}
	}
	p.ensure(ctx, vcenter, want)
	return false, nil
}

// zones are the namespace's; not ok if it can have no pools as things are.
func (p *pass) zones(all []vc.ZoneState) (zones []vc.ZoneState, ok bool) {
	zones, unknown := selectZones(p.ns.Spec.Zones, all)
	for _, name := range unknown {
		p.wait(v1alpha1.ReasonUnknownZone, "the Supervisor has no zone %s: add it there, or make the namespace anew without it", name)
	}
	if needsMHz(p.ns.Spec.CPU) {
		for _, z := range zones {
			if z.MHzPerCore == 0 {
				p.fail(v1alpha1.ReasonNoHosts, "cluster %s of zone %s has no hosts, whose clock says what a core is worth: add one, or take the CPU limit and reservation away", z.Path, z.Name)
				return zones, false
			}
		}
	}
	return zones, len(zones) > 0
}

// desired is the spec in vSphere's terms.
func (p *pass) desired(zones []vc.ZoneState, state vc.State) vc.Namespace {
	s := &p.ns.Spec
	want := vc.Namespace{
		Ref: p.ref(), Description: s.Description, Attributes: s.Attributes, Tags: s.Tags,
		Access: vcAccess(s.Access, p.sup.Spec.SSODomain), Pools: desiredPools(s, zones),
	}
	p.spareUse(&want, state)
	return want
}

// spareUse leaves a pool the limit it has where the spec's is below what pods
// use, and says so: lowering it would starve VMs that run. The quota is lowered
// all the same, so that use can only fall.
func (p *pass) spareUse(want *vc.Namespace, state vc.State) {
	use := p.ns.Status.Usage
	if use == nil {
		return
	}
	s := &p.ns.Spec
	cpu := s.CPU != nil && s.CPU.Limit != nil && use.CPU != nil && use.CPU.Cmp(*s.CPU.Limit) > 0
	memory := s.Memory != nil && s.Memory.Limit != nil && use.Memory != nil && use.Memory.Cmp(*s.Memory.Limit) > 0
	tell := func(what string, limit, used *resource.Quantity) {
		p.wait(v1alpha1.ReasonLimitBelowUse, "the %s limit %s is below the %s that pods use: end pods, or raise the limit; until then new pods are refused and the pool keeps a larger limit", what, limit, used)
	}
	if cpu {
		tell("CPU", s.CPU.Limit, use.CPU)
	}
	if memory {
		tell("memory", s.Memory.Limit, use.Memory)
	}
	keep := func(want *vc.Allocation, have vc.Allocation) {
		if have.Limit == vc.Unlimited || have.Limit > want.Limit {
			want.Limit = have.Limit
		}
	}
	for i := range want.Pools {
		for _, have := range state.Pools {
			if have.Zone != want.Pools[i].Zone {
				continue
			}
			if cpu {
				keep(&want.Pools[i].CPU, have.CPU)
			}
			if memory {
				keep(&want.Pools[i].Memory, have.Memory)
			}
		}
	}
}

// drifted adopts what somebody changed in vSphere, when changed is true, or
// leaves it to ensure to mend it. It is told on both sides.
func (p *pass) drifted(ctx context.Context, d drift, state vc.State, zones []vc.ZoneState) (changed bool, err error) {
	spec := p.ns.Spec.DeepCopy()
	policy := p.ns.Spec.DriftPolicy
	var adopted, mended []vc.Drift
	if policy.Limits != v1alpha1.Mend && adoptLimits(spec, d, state, zones) {
		adopted = append(adopted, d.limits...)
	} else {
		mended = append(mended, d.limits...)
	}
	if policy.Structure == v1alpha1.Adopt && adoptStructure(spec, d, state, p.sup.Spec.SSODomain) {
		adopted = append(adopted, d.structure...)
	} else {
		mended = append(mended, d.structure...)
	}
	var text []string
	if len(adopted) > 0 {
		text = append(text, driftText(adopted)+": taken into the spec")
	}
	if len(mended) > 0 {
		text = append(text, driftText(mended)+": changed back, as spec.driftPolicy says")
	}
	fresh, err := p.tell(ctx, v1alpha1.ReasonDrift, "somebody changed vSphere: "+strings.Join(text, "; "))
	if err != nil {
		return false, err
	}
	if fresh {
		for _, diff := range adopted {
			p.metrics.drifted(string(diff.Field), "adopted")
		}
		for _, diff := range mended {
			p.metrics.drifted(string(diff.Field), "mended")
		}
	}
	if equality.Semantic.DeepEqual(spec, &p.ns.Spec) {
		return false, nil
	}
	p.ns.Spec = *spec
	return true, p.update(ctx)
}

// ensure has vSphere be as want says, and writes down what then is.
func (p *pass) ensure(ctx context.Context, vcenter VCenter, want vc.Namespace) {
	state, err := vcenter.Ensure(ctx, want)
	if errdefs.IsAlreadyExists(err) && p.clearOrphan(ctx, vcenter) {
		state, err = vcenter.Ensure(ctx, want)
	}
	if len(state.Pools) > 0 || err == nil {
		p.ns.Status.Pools = nil
		for _, pool := range state.Pools {
			if slices.ContainsFunc(p.ns.Status.Pools, func(s v1alpha1.PoolStatus) bool { return s.Zone == pool.Zone }) {
				continue
			}
			p.ns.Status.Pools = append(p.ns.Status.Pools, v1alpha1.PoolStatus{
				Zone: pool.Zone, ID: pool.ID, Path: pool.Path, CPU: statusAllocation(pool.CPU), Memory: statusAllocation(pool.Memory),
			})
		}
	}
	if state.Folder != nil {
		p.ns.Status.Folder = &v1alpha1.FolderStatus{ID: state.Folder.ID, Path: state.Folder.Path}
	}
	if err != nil {
		p.ensureProblems(err)
		return
	}
	s := &p.ns.Spec
	if last := p.ns.Status.LastSynced; last == nil || last.Generation != p.ns.Generation {
		p.ns.Status.LastSynced = &v1alpha1.LastSynced{
			Time: metav1.NewTime(p.now()), Generation: p.ns.Generation, CPU: s.CPU.DeepCopy(), Memory: s.Memory.DeepCopy(),
		}
	}
}

// clearOrphan removes what an earlier SupervisorNamespace of this name left
// behind, if it is empty. That one is gone for certain: names are unique, and
// this one has the name.
func (p *pass) clearOrphan(ctx context.Context, vcenter VCenter) bool {
	refs, err := vcenter.List()
	if err != nil {
		return false
	}
	cleared := false
	for _, ref := range refs {
		if ref.Name != p.ns.Name || ref.UID == string(p.ns.UID) {
			continue
		}
		if err := vcenter.Delete(ctx, ref); err != nil {
			p.fail(v1alpha1.ReasonPoolNotOurs, "an earlier namespace %s left its pool or folder behind: %v", p.ns.Name, err)
			continue
		}
		p.log.Info("removed what an earlier namespace left in vSphere", "namespace", p.ns.Name, "uid", ref.UID)
		cleared = true
	}
	return cleared
}

// ensureProblems names each reason why vSphere is not as it should be.
func (p *pass) ensureProblems(err error) {
	for _, err := range flatten(err) {
		reason := ensureReason(err)
		if errdefs.IsUnavailable(err) {
			p.vcenterProblem(err)
			continue
		}
		p.fail(reason, "%v", err)
	}
}

// flatten undoes errors.Join.
func flatten(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok { //nolint:errorlint // a joined error at the top, not below
		var out []error
		for _, e := range joined.Unwrap() {
			out = append(out, flatten(e)...)
		}
		if isJoin(err, out) {
			return out
		}
	}
	return []error{err}
}

// isJoin tells errors.Join's result from fmt.Errorf with several %w: the former
// is its parts' lines.
func isJoin(err error, parts []error) bool {
	var lines []string
	for _, p := range parts {
		lines = append(lines, p.Error())
	}
	return err.Error() == strings.Join(lines, "\n")
}

func ensureReason(err error) string {
	var part *vc.PartError
	var field vc.Field
	if errors.As(err, &part) {
		field = part.Field
	}
	switch {
	case errdefs.IsPermissionDenied(err):
		return v1alpha1.ReasonPermissionDenied
	case errdefs.IsAlreadyExists(err):
		return v1alpha1.ReasonPoolNotOurs
	case errdefs.IsInvalidArgument(err) && field == vc.FieldAccess:
		return v1alpha1.ReasonUnknownUser
	case errdefs.IsFailedPrecondition(err) && field == vc.FieldAccess:
		return v1alpha1.ReasonAccessRefused
	case errdefs.IsInvalidArgument(err) && field == vc.FieldTag:
		return v1alpha1.ReasonUnknownTag
	case errdefs.IsFailedPrecondition(err) && (field == vc.FieldCPU || field == vc.FieldMemory):
		return v1alpha1.ReasonReservationTooLarge
	}
	return v1alpha1.ReasonTaskFailed
}

// vcenterReason is why vCenter cannot be asked.
func vcenterReason(err error) string {
	switch {
	case errors.Is(err, vsphere.ErrLogin):
		return v1alpha1.ReasonCredentialsInvalid
	case errors.Is(err, vsphere.ErrUntrusted):
		return v1alpha1.ReasonCertificateNotTrusted
	case errdefs.IsPermissionDenied(err):
		return v1alpha1.ReasonPermissionDenied
	case errdefs.IsInvalidArgument(err):
		return v1alpha1.ReasonUnknownCluster
	}
	return v1alpha1.ReasonVCenterUnreachable
}

// vcenterProblem is one about which nothing is known. It ends with an event
// while there is no connection, else it is tried again.
func (p *pass) vcenterProblem(err error) {
	reason := vcenterReason(err)
	waits := true
	p.conn.await() // before the question, or its return might be missed
	if p.conn.connected() {
		waits, p.retry = false, true
		if reason == v1alpha1.ReasonVCenterUnreachable {
			reason = v1alpha1.ReasonTaskTimeout
		}
	}
	p.problems = append(p.problems, problem{reason: reason, text: err.Error(), unknown: true, waits: waits})
}

// zonesProblem is about the Supervisor's clusters.
func (p *pass) zonesProblem(err error) {
	if errdefs.IsInvalidArgument(err) || errdefs.IsPermissionDenied(err) {
		p.fail(vcenterReason(err), "%v", err)
		return
	}
	p.vcenterProblem(err)
}

// liveSupervisorID is the id by which vSphere's objects are ours: the cluster's
// own, which a backup keeps.
func liveSupervisorID(ctx context.Context, live client.Reader) (string, error) {
	n := &corev1.Namespace{}
	if err := live.Get(ctx, client.ObjectKey{Name: metav1.NamespaceSystem}, n); err != nil {
		return "", fmt.Errorf("the cluster's id, the UID of namespace %s: %w", metav1.NamespaceSystem, err)
	}
	return string(n.UID), nil
}
