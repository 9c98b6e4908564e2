package namespaces

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/supervisor/namespaces/vc"
)

func q(s string) *resource.Quantity {
	v := resource.MustParse(s)
	return &v
}

// TestCoresThereAndBack: what an administrator sets in MHz must not change when
// it has been taken into the spec.
func TestCoresThereAndBack(t *testing.T) {
	for _, rate := range []int64{1, 800, 2294, 2400, 3333, 5001} {
		for _, mhz := range []int64{1, 7, 500, 1000, 2294, 123457} {
			cores := toCores(mhz, rate)
			if got := toMHz(cores, rate); got != mhz {
				t.Errorf("%d MHz at %d MHz a core: %s cores, which are %d MHz", mhz, rate, cores, got)
			}
		}
	}
	for _, tc := range []struct {
		cores string
		rate  int64
		want  int64
	}{{"8", 2294, 18352}, {"500m", 2295, 1148}, {"1m", 100, 1}, {"1u", 100, 1}, {"0", 2294, 0}} {
		if got := toMHz(q(tc.cores), tc.rate); got != tc.want {
			t.Errorf("%s cores at %d: %d MHz, want %d", tc.cores, tc.rate, got, tc.want)
		}
	}
	if got := toCores(4588, 2294).String(); got != "2" {
		t.Errorf("4588 MHz are %s cores, want 2", got)
	}
}

func TestMiBRoundsUp(t *testing.T) {
	for in, want := range map[string]int64{"1Gi": 1024, "1": 1, "1048577": 2, "1G": 954} {
		if got := toMiB(q(in)); got != want {
			t.Errorf("%s: %d MiB, want %d", in, got, want)
		}
	}
}

func TestDesiredPools(t *testing.T) {
	zones := []vc.ZoneState{
		{Zone: vc.Zone{Name: "a"}, MHzPerCore: 2000},
		{Zone: vc.Zone{Name: "b"}, MHzPerCore: 1000},
	}
	normal := vc.Shares{Level: vc.SharesNormal}
	spec := &v1alpha1.SupervisorNamespaceSpec{NamespaceSettings: v1alpha1.NamespaceSettings{
		CPU:    &v1alpha1.CPUAllocation{Limit: q("3"), Reservation: q("1")},
		Memory: &v1alpha1.MemoryAllocation{Limit: q("1025Mi"), Shares: &v1alpha1.Shares{Level: v1alpha1.SharesHigh}},
	}}
	want := []vc.Pool{
		{Zone: "a", CPU: vc.Allocation{Limit: 3000, Reservation: 1000, Shares: normal}, Memory: vc.Allocation{Limit: 513, Shares: vc.Shares{Level: vc.SharesHigh}}},
		{Zone: "b", CPU: vc.Allocation{Limit: 1500, Reservation: 500, Shares: normal}, Memory: vc.Allocation{Limit: 512, Shares: vc.Shares{Level: vc.SharesHigh}}},
	}
	if got := desiredPools(spec, zones); !equality.Semantic.DeepEqual(got, want) {
		t.Errorf("two zones: %+v\nwant %+v", got, want)
	}
	got := desiredPools(&v1alpha1.SupervisorNamespaceSpec{}, zones[:1])
	free := vc.Allocation{Limit: vc.Unlimited, Shares: normal}
	if !equality.Semantic.DeepEqual(got, []vc.Pool{{Zone: "a", CPU: free, Memory: free}}) {
		t.Errorf("no limits: %+v", got)
	}
}

func TestSelectZones(t *testing.T) {
	all := []vc.ZoneState{{Zone: vc.Zone{Name: "a"}}, {Zone: vc.Zone{Name: "b"}}}
	if got, unknown := selectZones(nil, all); len(got) != 2 || unknown != nil {
		t.Errorf("no zones named: %v, unknown %v", got, unknown)
	}
	got, unknown := selectZones([]string{"c", "b"}, all)
	if len(got) != 1 || got[0].Name != "b" || len(unknown) != 1 || unknown[0] != "c" {
		t.Errorf("b and c: %v, unknown %v", got, unknown)
	}
}

func TestSubjects(t *testing.T) {
	for _, tc := range []struct {
		kind         v1alpha1.SubjectKind
		name, domain string
		want         string
		local        bool
	}{
		{v1alpha1.UserSubject, "Ada", "", "sso:ada@corp.example", false},
		{v1alpha1.GroupSubject, "Devs", "vsphere.local", "sso:devs@vsphere.local", false},
		{v1alpha1.UserSubject, "ada@mail", "-", "ada@mail", true},
	} {
		s, err := newSubject(tc.kind, tc.name, tc.domain, "corp.example")
		if err != nil || s.name != tc.want || s.local != tc.local || s.kind != string(tc.kind) {
			t.Errorf("%s in %q: %+v, %v; want %s", tc.name, tc.domain, s, err, tc.want)
		}
	}
	access := vcAccess([]v1alpha1.AccessEntry{
		{Kind: v1alpha1.UserSubject, Name: "Ada", Role: v1alpha1.RoleEdit},
		{Kind: v1alpha1.UserSubject, Name: "root", Domain: "localos", Role: v1alpha1.RoleView},
		{Kind: v1alpha1.UserSubject, Name: "only-here", Domain: "-", Role: v1alpha1.RoleView},
	}, "corp.example")
	want := []vc.Access{
		{Subject: "ada", Domain: "corp.example", Role: vc.RoleEdit},
		{Subject: "root", Role: vc.RoleView},
	}
	if !equality.Semantic.DeepEqual(access, want) {
		t.Errorf("access %+v, want %+v", access, want)
	}
	if vcAccess(nil, "x") == nil {
		t.Error("nil would leave permissions alone")
	}
}

func TestPolicyNames(t *testing.T) {
	none := func(string) bool { return false }
	const id = "aa6d5a82-1c88-45da-85d3-3d74b91a5bad"
	for in, want := range map[string]string{
		"vSAN Default Storage Policy":  "vsan-default-storage-policy",
		"  Gold / fast (NVMe)!":        "gold-fast-nvme",
		"Größe":                        "gr-e",
		"日本":                           "policy-aa6d5a82",
		strings.Repeat("x", 70):        strings.Repeat("x", 63),
		strings.Repeat("x", 62) + " y": strings.Repeat("x", 62),
	} {
		if got := policyName(in, id, none); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	taken := map[string]bool{"gold": true}
	is := func(n string) bool { return taken[n] }
	for _, want := range []string{"gold-aa6d5a82", "gold-aa6d5a82-1", "gold-aa6d5a82-1c"} {
		got := policyName("Gold", id, is)
		if got != want {
			t.Errorf("gold is taken: %q, want %q", got, want)
		}
		taken[got] = true
	}
	long := strings.Repeat("x", 63)
	if got := policyName(long, id, func(n string) bool { return n == long }); len(got) > 63 || !strings.HasSuffix(got, "-aa6d5a82") {
		t.Errorf("a long one that is taken: %q", got)
	}
}

func TestBackoff(t *testing.T) {
	for n := range 40 {
		d := backoff(n)
		if d < firstRetry || d > lastRetry+lastRetry/4 {
			t.Errorf("after %d failures: %s", n, d)
		}
	}
	if backoff(30) < lastRetry || backoff(0) >= 2*firstRetry {
		t.Error("it does not grow")
	}
}
