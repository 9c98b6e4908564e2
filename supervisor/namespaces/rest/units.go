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

// mhz rounds to the nearest, as the resource pool has it, and makes at least 1
// of anything.
func (c clock) mhz(cores resource.Quantity) int64 {
	n := unscaled(cores, 6)
	m := nearest(n, c.sum, c.zones, 1_000_000)
	if m == 0 && n.Sign() > 0 {
		return 1
	}
	return m
}

// cores is what mhz makes the same figure of, in thousandths if they are exact
// enough.
func (c clock) cores(mhz int64) resource.Quantity {
	n := big.NewInt(mhz)
	milli := resource.NewScaledQuantity(nearest(n, c.zones*1_000, 1, c.sum), resource.Milli)
	if c.mhz(*milli) == mhz {
		return *milli
	}
	return *resource.NewScaledQuantity(nearest(n, c.zones*1_000_000, 1, c.sum), resource.Micro)
}

const mebi = 1 << 20

// mib rounds up.
func mib(bytes resource.Quantity) int64 { return clip(divUp(unscaled(bytes, 0), big.NewInt(mebi))) }

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

// nearest is n*a/(b*d), rounded to the nearest.
func nearest(n *big.Int, a, b, d int64) int64 {
	by := new(big.Int).Mul(big.NewInt(b), big.NewInt(d))
	r := new(big.Int).Mul(n, big.NewInt(2*a))
	return clip(r.Add(r, by).Div(r, by.Mul(by, big.NewInt(2))))
}

// clip is at most the largest int64.
func clip(n *big.Int) int64 {
	if !n.IsInt64() {
		return 1<<63 - 1
	}
	return n.Int64()
}

// divUp rounds up; d is positive.
func divUp(n, d *big.Int) *big.Int {
	q, m := new(big.Int).DivMod(n, d, new(big.Int))
	if m.Sign() != 0 {
		q.Add(q, big.NewInt(1))
	}
	return q
}
