package rest

import (
	"math/big"
	"slices"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// A clock converts between cores, by which Kubernetes counts, and MHz, by which
// vSphere does. It is the mean over a namespace's zones, since its limit is
// split evenly over them. The zero clock is one that vCenter has not told yet.
type clock struct {
	sum   int64 // MHz of one core, added up over the zones
	zones int64
}

// clockOf is that of the zones named; of all, if none is.
func clockOf(zones []v1alpha1.ZoneStatus, names []string) clock {
	var c clock
	for _, z := range zones {
		if len(names) > 0 && !slices.Contains(names, z.Name) {
			continue
		}
		if z.MHzPerCore <= 0 {
			return clock{}
		}
		c.sum += z.MHzPerCore
		c.zones++
	}
	return c
}

func (c clock) known() bool { return c.sum > 0 }

// mhz rounds up, so that what Kubernetes allows fits in what vSphere says.
func (c clock) mhz(cores resource.Quantity) int64 {
	return ceil(unscaled(cores, 9), c.sum, c.zones, 1_000_000_000)
}

// cores is the shortest quantity that mhz makes the same figure of.
func (c clock) cores(mhz int64) resource.Quantity {
	for _, scale := range []resource.Scale{resource.Milli, resource.Micro} {
		one := int64(1_000)
		if scale == resource.Micro {
			one = 1_000_000
		}
		q := resource.NewScaledQuantity(floor(mhz, c.zones, one, c.sum), scale)
		if c.mhz(*q) == mhz {
			return *q
		}
	}
	return *resource.NewScaledQuantity(floor(mhz, c.zones, 1_000_000_000, c.sum), resource.Nano)
}

const mebi = 1 << 20

// mib rounds up.
func mib(bytes resource.Quantity) int64 { return ceil(unscaled(bytes, 0), 1, 1, mebi) }

func bytesOf(mib int64) resource.Quantity {
	return *resource.NewQuantity(mib*mebi, resource.BinarySI)
}

// maxMiB is what a quantity of bytes holds in 63 bits.
const maxMiB = 1<<43 - 1

// unscaled is the quantity times 10^digits, rounded up.
func unscaled(q resource.Quantity, digits int64) *big.Int {
	d := q.DeepCopy()
	dec := d.AsDec()
	n := new(big.Int).Set(dec.UnscaledBig())
	shift := digits - int64(dec.Scale())
	power := new(big.Int).Exp(big.NewInt(10), big.NewInt(max(shift, -shift)), nil)
	if shift >= 0 {
		return n.Mul(n, power)
	}
	return divUp(n, power)
}

// ceil is n*a/(b*d), rounded up, at most the largest int64.
func ceil(n *big.Int, a, b, d int64) int64 {
	r := divUp(new(big.Int).Mul(n, big.NewInt(a)), new(big.Int).Mul(big.NewInt(b), big.NewInt(d)))
	if !r.IsInt64() {
		return 1<<63 - 1
	}
	return r.Int64()
}

// floor is n*a*b/d, rounded down.
func floor(n, a, b, d int64) int64 {
	r := new(big.Int).Mul(big.NewInt(n), big.NewInt(a))
	r.Mul(r, big.NewInt(b)).Div(r, big.NewInt(d))
	if !r.IsInt64() {
		return 1<<63 - 1
	}
	return r.Int64()
}

// divUp rounds up; d is positive.
func divUp(n, d *big.Int) *big.Int {
	q, m := new(big.Int).DivMod(n, d, new(big.Int))
	if m.Sign() != 0 {
		q.Add(q, big.NewInt(1))
	}
	return q
}
