package namespaces

import (
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/sso"
	"github.com/openatoll/atoll/supervisor/namespaces/vc"
)

// A drift is what somebody changed in vSphere since both sides were last in
// step.
type drift struct {
	cpu, memory bool // limits, reservations or shares of a pool
	structure   []vc.Drift
	limits      []vc.Drift
}

func (d drift) none() bool { return len(d.limits) == 0 && len(d.structure) == 0 }

// findDrift picks from what Ensure would mend (vc.Diff) what somebody else must
// have done: a pool's limits that differ both from the spec and from what they
// were when both sides were last in step, while the spec's are unchanged; and
// all else that differs while the spec is unchanged as a whole. What a change of
// the spec explains, or a start that was cut short, is none.
func findDrift(ns *v1alpha1.SupervisorNamespace, diffs []vc.Drift) drift {
	var d drift
	last := ns.Status.LastSynced
	if last == nil {
		return d
	}
	sameCPU := equality.Semantic.DeepEqual(last.CPU, ns.Spec.CPU)
	sameMemory := equality.Semantic.DeepEqual(last.Memory, ns.Spec.Memory)
	for _, diff := range diffs {
		if !diff.Limits() {
			if last.Generation == ns.Generation && diff.Field != vc.FieldTag {
				d.structure = append(d.structure, diff)
			}
			continue
		}
		i := slices.IndexFunc(ns.Status.Pools, func(p v1alpha1.PoolStatus) bool { return p.Zone == diff.Zone })
		if i < 0 || diff.Pool == nil {
			continue
		}
		switch before := ns.Status.Pools[i]; {
		case diff.Field == vc.FieldCPU && sameCPU && statusAllocation(diff.Pool.CPU) != before.CPU:
			d.cpu = true
		case diff.Field == vc.FieldMemory && sameMemory && statusAllocation(diff.Pool.Memory) != before.Memory:
			d.memory = true
		default:
			continue
		}
		d.limits = append(d.limits, diff)
	}
	return d
}

// text tells people, in one sentence, what was changed.
func driftText(diffs []vc.Drift) string {
	var parts []string
	for _, d := range diffs {
		if !slices.Contains(parts, d.Message) {
			parts = append(parts, d.Message)
		}
	}
	if len(parts) > 4 {
		parts = append(parts[:4], fmt.Sprintf("and %d more", len(parts)-4))
	}
	return strings.Join(parts, "; ")
}

// adoptLimits takes the pools' limits into the spec: over several zones, their
// sum. It returns whether the spec changed.
func adoptLimits(spec *v1alpha1.SupervisorNamespaceSpec, d drift, have vc.State, zones []vc.ZoneState) bool {
	before := spec.DeepCopy()
	if d.cpu {
		spec.CPU = adoptedCPU(d, have, zones)
	}
	if d.memory {
		spec.Memory = adoptedMemory(d, have)
	}
	return !equality.Semantic.DeepEqual(before, spec)
}

func adoptedCPU(d drift, have vc.State, zones []vc.ZoneState) *v1alpha1.CPUAllocation {
	out := &v1alpha1.CPUAllocation{Limit: new(resource.Quantity), Reservation: new(resource.Quantity), Shares: specShares(changedShares(d, vc.FieldCPU))}
	for _, z := range zones {
		i := slices.IndexFunc(have.Pools, func(p vc.PoolState) bool { return p.Zone == z.Name })
		if i < 0 || z.MHzPerCore == 0 {
			continue
		}
		cpu := have.Pools[i].CPU
		if cpu.Limit == vc.Unlimited {
			out.Limit = nil
		}
		if out.Limit != nil {
			out.Limit.Add(*toCores(cpu.Limit, z.MHzPerCore))
		}
		out.Reservation.Add(*toCores(cpu.Reservation, z.MHzPerCore))
	}
	if out.Reservation.IsZero() {
		out.Reservation = nil
	}
	if out.Limit == nil && out.Reservation == nil && out.Shares == nil {
		return nil
	}
	return out
}

func adoptedMemory(d drift, have vc.State) *v1alpha1.MemoryAllocation {
	out := &v1alpha1.MemoryAllocation{Shares: specShares(changedShares(d, vc.FieldMemory))}
	var limit, reservation int64
	unlimited := false
	for _, p := range have.Pools {
		unlimited = unlimited || p.Memory.Limit == vc.Unlimited
		limit += p.Memory.Limit
		reservation += p.Memory.Reservation
	}
	if !unlimited {
		out.Limit = toBytes(limit)
	}
	if reservation > 0 {
		out.Reservation = toBytes(reservation)
	}
	if out.Limit == nil && out.Reservation == nil && out.Shares == nil {
		return nil
	}
	return out
}

// changedShares are those of the pool that was changed.
func changedShares(d drift, field vc.Field) vc.Shares {
	for _, diff := range d.limits {
		if diff.Field == field {
			if field == vc.FieldCPU {
				return diff.Pool.CPU.Shares
			}
			return diff.Pool.Memory.Shares
		}
	}
	return vc.Shares{}
}

// adoptStructure takes into the spec what can be part of one: description,
// attributes, access list. It returns whether the spec changed.
func adoptStructure(spec *v1alpha1.SupervisorNamespaceSpec, d drift, have vc.State, ssoDomain string) bool {
	before := spec.DeepCopy()
	for _, diff := range d.structure {
		switch diff.Field {
		case vc.FieldDescription:
			spec.Description = clip(diff.Have, 1024)
		case vc.FieldAttribute:
			name, value, _ := strings.Cut(diff.Have, "=")
			if spec.Attributes[name] != value {
				spec.Attributes[name] = clip(value, 1024)
			}
		case vc.FieldAccess:
			if access, ok := adoptedAccess(spec.Access, have, ssoDomain); ok {
				spec.Access = access
			}
		}
	}
	return !equality.Semantic.DeepEqual(before, spec)
}

// adoptedAccess is not ok where vSphere has what an access list cannot say:
// other roles, or different permissions on pools and folder of which more than
// one is new. That of one object alone is taken for all: an administrator sets
// one after the other.
func adoptedAccess(old []v1alpha1.AccessEntry, have vc.State, ssoDomain string) ([]v1alpha1.AccessEntry, bool) {
	access := have.Access
	if have.AccessUneven != nil {
		is := vcAccess(old, ssoDomain)
		changed := slices.DeleteFunc(slices.Clone(have.AccessUneven), func(a []vc.Access) bool { return vc.SameAccess(a, is) })
		if len(changed) != 1 {
			return nil, false
		}
		access = changed[0]
	}
	var out []v1alpha1.AccessEntry
	for _, e := range old {
		if e.Domain == v1alpha1.LocalDomain {
			out = append(out, e)
		}
	}
	for _, a := range access {
		if a.Role != vc.RoleOwner && a.Role != vc.RoleEdit && a.Role != vc.RoleView {
			return nil, false
		}
		p, err := sso.New(a.Subject, a.Domain)
		if err != nil {
			return nil, false
		}
		e := v1alpha1.AccessEntry{Kind: v1alpha1.UserSubject, Name: p.Name, Domain: p.Domain, Role: v1alpha1.AccessRole(a.Role)}
		if a.Group {
			e.Kind = v1alpha1.GroupSubject
		}
		// An entry that is there already keeps the way it was written.
		for _, o := range old {
			if s, err := newSubject(o.Kind, o.Name, o.Domain, ssoDomain); err == nil && s.sso == p && o.Kind == e.Kind {
				e.Name, e.Domain = o.Name, o.Domain
			}
		}
		out = append(out, e)
	}
	return out, true
}

// clip shortens to at most n bytes, at a rune's edge.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && s[n]&0xC0 == 0x80 {
		n--
	}
	return s[:n]
}
