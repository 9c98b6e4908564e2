package rest

import (
	"math/rand/v2"
	"testing"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/openatoll/atoll/api/v1alpha1"
)

func TestMHz(t *testing.T) {
	one := clock{sum: 2294, zones: 1}
	two := clock{sum: 2000 + 3000, zones: 2}
	for _, tc := range []struct {
		clock clock
		cores string
		mhz   int64
	}{
		{one, "1", 2294},
		{one, "4", 9176},
		{one, "500m", 1147},
		{one, "1m", 2}, // 2.294
		{one, "3m", 7}, // 6.882
		{one, "1n", 1},
		{one, "0", 0},
		{two, "1", 2500},
		{two, "2", 5000},
		{clock{sum: 1000, zones: 1}, "1500m", 1500},
		{clock{sum: 1, zones: 1}, "9e18", 9e18},
		{one, "9e18", 1<<63 - 1}, // as much as fits
	} {
		if got := tc.clock.mhz(resource.MustParse(tc.cores)); got != tc.mhz {
			t.Errorf("%v: %s cores = %d MHz, want %d", tc.clock, tc.cores, got, tc.mhz)
		}
	}
}

func TestCores(t *testing.T) {
	one := clock{sum: 2294, zones: 1}
	for _, tc := range []struct {
		clock clock
		mhz   int64
		cores string
	}{
		{one, 9176, "4"},
		{one, 1147, "500m"},
		{one, 5000, "2179599u"}, // thousandths are 2.3 MHz apart
		{clock{sum: 1000, zones: 1}, 1500, "1500m"},
		{clock{sum: 5000, zones: 2}, 5000, "2"},
		{one, 0, "0"},
	} {
		got := tc.clock.cores(tc.mhz)
		if got.String() != tc.cores {
			t.Errorf("%v: %d MHz = %s cores, want %s", tc.clock, tc.mhz, got.String(), tc.cores)
		}
	}
}

// TestMHzSurvive holds that every figure of vSphere's comes back as it went.
func TestMHzSurvive(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 20000 {
		c := clock{zones: 1 + r.Int64N(16)}
		c.sum = c.zones * (1 + r.Int64N(6000))
		mhz := r.Int64N(1 << (1 + r.IntN(40)))
		q := c.cores(mhz)
		if got := c.mhz(q); got != mhz {
			t.Fatalf("%+v: %d MHz became %s cores and then %d MHz", c, mhz, q.String(), got)
		}
		if again, err := resource.ParseQuantity(q.String()); err != nil || again.Cmp(q) != 0 {
			t.Fatalf("%s is not read back: %v", q.String(), err)
		}
	}
}

func TestMiB(t *testing.T) {
	for _, tc := range []struct {
		bytes string
		mib   int64
	}{
		{"1Gi", 1024}, {"1G", 954}, {"1", 1}, {"0", 0}, {"1Mi", 1}, {"1048577", 2}, {"100m", 1},
	} {
		if got := mib(resource.MustParse(tc.bytes)); got != tc.mib {
			t.Errorf("%s = %d MiB, want %d", tc.bytes, got, tc.mib)
		}
	}
	for _, n := range []int64{0, 1, 1000, 1024, maxMiB} {
		if got := mib(bytesOf(n)); got != n {
			t.Errorf("%d MiB became %d", n, got)
		}
	}
}

func TestClockOf(t *testing.T) {
	zones := []v1alpha1.ZoneStatus{{Name: "a", MHzPerCore: 2000}, {Name: "b", MHzPerCore: 3000}, {Name: "c"}}
	for _, tc := range []struct {
		names []string
		want  clock
	}{
		{[]string{"a"}, clock{2000, 1}},
		{[]string{"a", "b"}, clock{5000, 2}},
		{[]string{"a", "c"}, clock{}}, // one that is not known makes the mean unknown
		{nil, clock{}},
		{[]string{"gone"}, clock{}},
	} {
		if got := clockOf(zones, tc.names); got != tc.want {
			t.Errorf("zones %v: %+v, want %+v", tc.names, got, tc.want)
		}
	}
}
