package namespaces

import (
	"cmp"
	"math/big"
	"slices"
	"strconv"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/sso"
	"github.com/openatoll/atoll/supervisor/namespaces/vc"
)

const (
	micro = 1_000_000
	mib   = 1 << 20
)

// toMHz is what so many cores are worth, rounded to the nearest, at least 1 for
// anything above none.
func toMHz(cores *resource.Quantity, mhzPerCore int64) int64 {
	m := mulDiv(cores.ScaledValue(resource.Micro), mhzPerCore, micro)
	if m == 0 && cores.Sign() > 0 {
		return 1
	}
	return m
}

// toCores undoes toMHz: toMHz(toCores(m, r), r) == m for rates up to 500 GHz.
// Thousandths are preferred where they are exact enough.
func toCores(mhz, mhzPerCore int64) *resource.Quantity {
	milli := resource.NewMilliQuantity(mulDiv(mhz, 1000, mhzPerCore), resource.DecimalSI)
	if toMHz(milli, mhzPerCore) == mhz {
		return milli
	}
	return resource.NewScaledQuantity(mulDiv(mhz, micro, mhzPerCore), resource.Micro)
}

// mulDiv is a*b/c, rounded to the nearest; a and b are not negative.
func mulDiv(a, b, c int64) int64 {
	n := new(big.Int).Mul(big.NewInt(a), big.NewInt(b))
	n.Add(n, big.NewInt(c/2))
	return n.Div(n, big.NewInt(c)).Int64()
}

// toMiB rounds up, so that what a quota allows fits.
func toMiB(bytes *resource.Quantity) int64 {
	v := bytes.Value()
	if v%mib != 0 {
		return v/mib + 1
	}
	return v / mib
}

func toBytes(m int64) *resource.Quantity { return resource.NewQuantity(m*mib, resource.BinarySI) }

// cpuAllocation of all zones together, at one zone's rate.
func cpuAllocation(a *v1alpha1.CPUAllocation, mhzPerCore int64) vc.Allocation {
	if a == nil {
		a = &v1alpha1.CPUAllocation{}
	}
	return allocation(a.Limit, a.Reservation, a.Shares, func(q *resource.Quantity) int64 { return toMHz(q, mhzPerCore) })
}

func memoryAllocation(a *v1alpha1.MemoryAllocation) vc.Allocation {
	if a == nil {
		a = &v1alpha1.MemoryAllocation{}
	}
	return allocation(a.Limit, a.Reservation, a.Shares, toMiB)
}

func allocation(limit, reservation *resource.Quantity, shares *v1alpha1.Shares, unit func(*resource.Quantity) int64) vc.Allocation {
	out := vc.Allocation{Limit: vc.Unlimited, Shares: vc.Shares{Level: vc.SharesNormal}}
	if limit != nil {
		out.Limit = unit(limit)
	}
	if reservation != nil {
		out.Reservation = unit(reservation)
	}
	if shares != nil {
		out.Shares = vc.Shares{Level: cmp.Or(vc.SharesLevel(shares.Level), vc.SharesNormal)}
		if shares.Value != nil {
			out.Shares.Value = *shares.Value
		}
	}
	return out
}

// statusAllocation is how a pool's share is written down.
func statusAllocation(a vc.Allocation) v1alpha1.PoolAllocation {
	shares := string(cmp.Or(a.Shares.Level, vc.SharesNormal))
	if a.Shares.Level == vc.SharesCustom {
		shares = strconv.Itoa(int(a.Shares.Value))
	}
	return v1alpha1.PoolAllocation{Limit: a.Limit, Reservation: a.Reservation, Shares: shares, Fixed: a.Fixed}
}

// specShares is nil for what a spec need not say.
func specShares(s vc.Shares) *v1alpha1.Shares {
	switch s.Level {
	case "", vc.SharesNormal:
		return nil
	case vc.SharesCustom:
		v := s.Value
		return &v1alpha1.Shares{Level: v1alpha1.SharesCustom, Value: &v}
	}
	return &v1alpha1.Shares{Level: v1alpha1.SharesLevel(s.Level)}
}

// selectZones are the zones that a namespace is in, in the Supervisor's order,
// and the names that the Supervisor does not have.
func selectZones(names []string, all []vc.ZoneState) (chosen []vc.ZoneState, unknown []string) {
	if len(names) == 0 {
		return all, nil
	}
	for _, z := range all {
		if slices.Contains(names, z.Name) {
			chosen = append(chosen, z)
		}
	}
	for _, name := range names {
		if !slices.ContainsFunc(chosen, func(z vc.ZoneState) bool { return z.Name == name }) {
			unknown = append(unknown, name)
		}
	}
	return chosen, unknown
}

// desiredPools shares the spec's limits out over the zones.
func desiredPools(spec *v1alpha1.SupervisorNamespaceSpec, zones []vc.ZoneState) []vc.Pool {
	memory := vc.Split(memoryAllocation(spec.Memory), len(zones))
	pools := make([]vc.Pool, len(zones))
	for i, z := range zones {
		cpu := vc.Split(cpuAllocation(spec.CPU, z.MHzPerCore), len(zones))
		pools[i] = vc.Pool{Zone: z.Name, CPU: cpu[i], Memory: memory[i]}
	}
	return pools
}

// needsMHz tells whether the spec says anything in cores.
func needsMHz(a *v1alpha1.CPUAllocation) bool {
	return a != nil && (a.Limit != nil || a.Reservation != nil)
}

// A subject is who an entry of an access list means.
type subject struct {
	kind string // User or Group
	name string // in Kubernetes
	sso  sso.Principal
	// local subjects are Kubernetes' alone.
	local bool
}

func newSubject(kind v1alpha1.SubjectKind, name, domain, ssoDomain string) (subject, error) {
	if domain == v1alpha1.LocalDomain {
		return subject{kind: string(kind), name: name, local: true}, nil
	}
	p, err := sso.New(name, cmp.Or(domain, ssoDomain))
	if err != nil {
		return subject{}, err
	}
	return subject{kind: string(kind), name: p.Subject(), sso: p}, nil
}

// vcAccess is the access list as vSphere has it; never nil, since nil would
// leave permissions alone.
func vcAccess(entries []v1alpha1.AccessEntry, ssoDomain string) []vc.Access {
	out := []vc.Access{}
	for _, e := range entries {
		s, err := newSubject(e.Kind, e.Name, e.Domain, ssoDomain)
		if err != nil || s.local {
			continue // a bad one is reported with the RoleBindings
		}
		a := vc.Access{Subject: s.sso.Name, Domain: s.sso.Domain, Group: e.Kind == v1alpha1.GroupSubject, Role: vc.Role(e.Role)}
		if a.Domain == sso.LocalDomain {
			a.Domain = ""
		}
		out = append(out, a)
	}
	return out
}

// count is "3 pods", "1 pod", or "100 pods or more".
func count(n int, more bool, what string) string {
	if n != 1 {
		what += "s"
	}
	out := strconv.Itoa(n) + " " + what
	if more {
		out += " or more"
	}
	return out
}
