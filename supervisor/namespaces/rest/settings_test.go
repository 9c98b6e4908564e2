package rest

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/openatoll/atoll/api/v1alpha1"
)

const goldID, silverID = "aa6d5a82-1c88-45da-85d3-3d74b91a5bad", "5f0b1d44-0000-4f1c-9a77-b1c9a0f0e001"

func policy(name, id string) v1alpha1.StoragePolicy {
	return v1alpha1.StoragePolicy{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.StoragePolicySpec{ID: id}}
}

func testEnvironment() environment {
	return environment{
		clock:     clock{sum: 2294, zones: 1},
		ssoDomain: "vsphere.local",
		policies:  policies{policy("gold", goldID), policy("silver", silverID)},
	}
}

func quantity(s string) *resource.Quantity {
	q := resource.MustParse(s)
	return &q
}

func ptr[T any](v T) *T { return &v }

// full is a namespace with everything that vSphere has a name for, and with what
// it has none for: reservation, shares, CronJobs, tags, attributes and the drift
// policy.
func full() v1alpha1.NamespaceSettings {
	return v1alpha1.NamespaceSettings{
		Description:       "shop",
		CPU:               &v1alpha1.CPUAllocation{Limit: quantity("4"), Reservation: quantity("1"), Shares: &v1alpha1.Shares{Level: v1alpha1.SharesHigh}},
		Memory:            &v1alpha1.MemoryAllocation{Limit: quantity("10G"), Reservation: quantity("1Gi")},
		ContainerDefaults: &v1alpha1.ContainerDefaults{CPURequest: quantity("250m"), CPULimit: quantity("500m"), MemoryRequest: quantity("256Mi"), MemoryLimit: quantity("512Mi")},
		StoragePolicies:   []v1alpha1.StoragePolicyLimit{{Name: "gold", Limit: quantity("100G")}, {Name: "silver"}},
		ObjectCounts:      &v1alpha1.ObjectCounts{Pods: ptr(int64(50)), Services: ptr(int64(0)), CronJobs: ptr(int64(3))},
		Access: []v1alpha1.AccessEntry{
			{Kind: v1alpha1.UserSubject, Name: "Ada", Role: v1alpha1.RoleOwner},
			{Kind: v1alpha1.UserSubject, Name: "ci", Domain: v1alpha1.LocalDomain, Role: v1alpha1.RoleEdit},
			{Kind: v1alpha1.GroupSubject, Name: "devs", Domain: "corp.example", Role: v1alpha1.RoleEdit},
		},
		VMClasses:   []string{"small"},
		Tags:        []string{"cost-centre/7"},
		Attributes:  map[string]string{"owner": "ada"},
		DriftPolicy: v1alpha1.DriftPolicy{Limits: v1alpha1.Mend},
	}
}

const fullJSON = `{
  "description": "shop",
  "resource_spec": {"cpu_limit": 9176, "memory_limit": 9537, "cpu_request_default": 574, "cpu_limit_default": 1147,
    "memory_request_default": 256, "memory_limit_default": 512, "pod_count": 50, "service_count": 0},
  "access_list": [
    {"subject_type": "USER", "subject": "Ada", "domain": "vsphere.local", "role": "OWNER"},
    {"subject_type": "GROUP", "subject": "devs", "domain": "corp.example", "role": "EDIT"}],
  "storage_specs": [{"policy": "` + goldID + `", "limit": 95368}, {"policy": "` + silverID + `"}],
  "vm_service_spec": {"content_libraries": [], "vm_classes": ["small"]}}`

func canonical(t *testing.T, text string) string {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return marshal(t, v)
}

func marshal(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	var plain any
	if err := json.Unmarshal(b, &plain); err != nil {
		t.Fatal(err)
	}
	b, err = json.Marshal(plain) // keys in order
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func decodeSettings(t *testing.T, text string) *settings {
	t.Helper()
	s := &settings{}
	if err := json.Unmarshal([]byte(text), s); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return s
}

func TestViewSettings(t *testing.T) {
	in := full()
	v, err := viewSettings(&in, testEnvironment())
	if err != nil {
		t.Fatal(err)
	}
	if got, want := marshal(t, v), canonical(t, fullJSON); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	empty, err := viewSettings(&v1alpha1.NamespaceSettings{}, environment{})
	if err != nil {
		t.Fatal(err)
	}
	want := canonical(t, `{"description": "", "access_list": [], "storage_specs": [], "vm_service_spec": {"content_libraries": [], "vm_classes": []}}`)
	if got := marshal(t, empty); got != want {
		t.Errorf("of nothing: got %s\nwant %s", got, want)
	}
	if _, err := viewSettings(&in, environment{}); faultOf(err) != faultServiceUnavailable {
		t.Errorf("without the hosts' clock: %v", err)
	}
}

func TestApply(t *testing.T) {
	for _, tc := range []struct {
		name, body string
		whole      bool
		from       v1alpha1.NamespaceSettings
		want       func(s *v1alpha1.NamespaceSettings)
	}{
		{name: "patch of nothing changes nothing", body: `{}`, from: full(), want: func(*v1alpha1.NamespaceSettings) {}},
		{name: "null is missing", body: `{"description": null, "resource_spec": null, "access_list": null, "storage_specs": null, "vm_service_spec": null}`, from: full(), want: func(*v1alpha1.NamespaceSettings) {}},
		{name: "what was read changes nothing, patched", body: fullJSON, from: full(), want: func(*v1alpha1.NamespaceSettings) {}},
		{name: "what was read changes nothing, set", body: fullJSON, whole: true, from: full(), want: func(*v1alpha1.NamespaceSettings) {}},
		{name: "one limit", body: `{"resource_spec": {"cpu_limit": 4588}}`, from: full(), want: func(s *v1alpha1.NamespaceSettings) { s.CPU.Limit = quantity("2") }},
		{name: "one limit away", body: `{"resource_spec": {"memory_limit_unset": true, "cpu_limit_unset": false}}`, from: full(), want: func(s *v1alpha1.NamespaceSettings) { s.Memory.Limit = nil }},
		{name: "the last count away", body: `{"resource_spec": {"pod_count_unset": true}}`,
			from: v1alpha1.NamespaceSettings{ObjectCounts: &v1alpha1.ObjectCounts{Pods: ptr(int64(1))}},
			want: func(s *v1alpha1.NamespaceSettings) { s.ObjectCounts = nil }},
		{name: "class of resource_spec", body: `{"resource_spec": {"@class": "com.vmware.vcenter.namespaces.resource_quota_options_v1", "memory_limit": 1024}}`,
			want: func(s *v1alpha1.NamespaceSettings) { s.Memory = &v1alpha1.MemoryAllocation{Limit: quantity("1Gi")} }},
		{name: "empty lists take away", body: `{"access_list": [], "storage_specs": [], "vm_service_spec": {"vm_classes": []}}`, from: full(), want: func(s *v1alpha1.NamespaceSettings) {
			s.Access, s.StoragePolicies, s.VMClasses = s.Access[1:2], nil, nil
		}},
		{name: "govc update without flags", body: `{"vm_service_spec": {"content_libraries": null, "vm_classes": null}, "storage_specs": []}`, from: full(), want: func(s *v1alpha1.NamespaceSettings) { s.StoragePolicies = nil }},
		{name: "set of nothing clears what vSphere has a name for", body: `{}`, whole: true, from: full(), want: func(s *v1alpha1.NamespaceSettings) {
			*s = v1alpha1.NamespaceSettings{
				CPU:          &v1alpha1.CPUAllocation{Reservation: s.CPU.Reservation, Shares: s.CPU.Shares},
				Memory:       &v1alpha1.MemoryAllocation{Reservation: s.Memory.Reservation},
				ObjectCounts: &v1alpha1.ObjectCounts{CronJobs: s.ObjectCounts.CronJobs},
				Access:       s.Access[1:2],
				Tags:         s.Tags, Attributes: s.Attributes, DriftPolicy: s.DriftPolicy,
			}
		}},
		{name: "a role changes, the rest of the entry stays", body: `{"access_list": [{"subject_type": "USER", "subject": "ADA", "domain": "VSPHERE.LOCAL", "role": "VIEW"}]}`, from: full(), want: func(s *v1alpha1.NamespaceSettings) {
			s.Access = []v1alpha1.AccessEntry{{Kind: v1alpha1.UserSubject, Name: "Ada", Role: v1alpha1.RoleView}, s.Access[1]}
		}},
		{name: "a new subject keeps its domain", body: `{"access_list": [{"subject_type": "USER", "subject": "Bob", "domain": "vsphere.local", "role": "EDIT"}]}`, want: func(s *v1alpha1.NamespaceSettings) {
			s.Access = []v1alpha1.AccessEntry{{Kind: v1alpha1.UserSubject, Name: "Bob", Domain: "vsphere.local", Role: v1alpha1.RoleEdit}}
		}},
		{name: "a policy that is gone from vCenter stays", body: `{"storage_specs": [{"policy": "bronze", "limit": 1}, {"policy": "` + goldID + `"}]}`,
			from: v1alpha1.NamespaceSettings{StoragePolicies: []v1alpha1.StoragePolicyLimit{{Name: "bronze"}}},
			want: func(s *v1alpha1.NamespaceSettings) {
				s.StoragePolicies = []v1alpha1.StoragePolicyLimit{{Name: "bronze", Limit: quantity("1Mi")}, {Name: "gold"}}
			}},
		{name: "fields that say nothing", body: `{"content_libraries": [], "networks": [], "network_spec": null, "namespace_network": {}, "edges": [], "infrastructure_policies": [], "creator": null, "self_service_namespace": false, "system_metadata": ""}`, from: full(), want: func(*v1alpha1.NamespaceSettings) {}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, want := *tc.from.DeepCopy(), *tc.from.DeepCopy()
			tc.want(&want)
			if err := decodeSettings(t, tc.body).apply(&got, testEnvironment(), tc.whole); err != nil {
				t.Fatal(err)
			}
			if !equality.Semantic.DeepEqual(got, want) {
				t.Errorf("got  %s\nwant %s", marshal(t, got), marshal(t, want))
			}
		})
	}
}

func TestApplyRefuses(t *testing.T) {
	env := testEnvironment()
	env.classes = map[string]bool{"large": true}
	for _, tc := range []struct {
		body, text string
		fault      fault
	}{
		{`{"networks": ["net-1"]}`, "networks", faultUnsupported},
		{`{"network_spec": {"network_provider": "NSX_VPC"}}`, "network_spec", faultUnsupported},
		{`{"content_libraries": [{"content_library": "x"}]}`, "content_libraries", faultUnsupported},
		{`{"vm_service_spec": {"content_libraries": ["x"]}}`, "vm_service_spec.content_libraries", faultUnsupported},
		{`{"creator": {"subject": "x"}}`, "creator", faultUnsupported},
		{`{"self_service_namespace": true}`, "self_service_namespace", faultUnsupported},
		{`{"resource_spec": {"storage_request_limit": 5}}`, "storage_specs", faultUnsupported},
		{`{"resource_spec": {"cpu_limit": 2000000000000}}`, "cpu_limit", faultInvalidArgument},
		{`{"resource_spec": {"memory_limit": 9223372036854775807}}`, "memory_limit", faultInvalidArgument},
		{`{"storage_specs": [{"policy": "gold"}]}`, `"gold"`, faultInvalidArgument}, // a name is no id
		{`{"storage_specs": [{"policy": "` + goldID + `"}, {"policy": "` + goldID + `"}]}`, "twice", faultInvalidArgument},
		{`{"storage_specs": [{"policy": "` + goldID + `", "limit": -1}]}`, "-1 MiB", faultInvalidArgument},
		{`{"access_list": [{"subject_type": "ROBOT", "subject": "a", "domain": "d", "role": "VIEW"}]}`, "ROBOT", faultInvalidArgument},
		{`{"access_list": [{"subject_type": "USER", "subject": "a", "domain": "d", "role": "ROOT"}]}`, "ROOT", faultInvalidArgument},
		{`{"access_list": [{"subject_type": "USER", "subject": "a@d", "domain": "d", "role": "VIEW"}]}`, "domain twice", faultInvalidArgument},
		{`{"access_list": [{"subject_type": "USER", "subject": "a", "role": "VIEW"}]}`, "domain", faultInvalidArgument},
		{`{"access_list": [{"subject_type": "USER", "subject": "a", "domain": "-", "role": "VIEW"}]}`, "domain", faultInvalidArgument},
		{`{"access_list": [{"subject_type": "USER", "subject": "a\\b", "domain": "d", "role": "VIEW"}]}`, "SSO", faultInvalidArgument},
		{`{"access_list": [{"subject_type": "USER", "subject": "a", "domain": "d", "role": "VIEW"}, {"subject_type": "USER", "subject": "A", "domain": "D", "role": "EDIT"}]}`, "twice", faultInvalidArgument},
		{`{"vm_service_spec": {"vm_classes": ["huge"]}}`, `"huge"`, faultInvalidArgument},
		{`{"vm_service_spec": {"vm_classes": ["large", "large"]}}`, "twice", faultInvalidArgument},
	} {
		to := full()
		err := decodeSettings(t, tc.body).apply(&to, env, false)
		if faultOf(err) != tc.fault || err == nil || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%s: %v, %v; want %v with %q", tc.body, faultOf(err), err, tc.fault, tc.text)
		}
	}
	env.clock = clock{}
	if err := decodeSettings(t, `{"resource_spec": {"cpu_limit": 1}}`).apply(&v1alpha1.NamespaceSettings{}, env, false); faultOf(err) != faultServiceUnavailable {
		t.Errorf("without the hosts' clock: %v", err)
	}
}

func TestQuotaBody(t *testing.T) {
	for _, tc := range []struct {
		body  string
		fault fault
	}{
		{`{"cpu_limitt": 1}`, faultUnexpectedInput},
		{`{"cpu_limit": "4"}`, faultUnexpectedInput},
		{`{"cpu_limit": 1.5}`, faultUnexpectedInput},
		{`{"cpu_limit_unset": 1}`, faultUnexpectedInput},
		{`{"cpu_limit": -1}`, faultInvalidArgument},
		{`{"cpu_limit": 1, "cpu_limit_unset": true}`, faultInvalidArgument},
	} {
		var q quota
		if err := json.Unmarshal([]byte(tc.body), &q); err == nil || faultOf(err) != tc.fault {
			t.Errorf("%s: %v; want %v", tc.body, err, tc.fault)
		}
	}
}

// TestQuotaNames holds the list against vSphere's ResourceQuotaOptionsV1.
func TestQuotaNames(t *testing.T) {
	want := []string{
		"config_map_count", "cpu_limit", "cpu_limit_default", "cpu_request_default", "daemon_set_count", "deployment_count",
		"job_count", "memory_limit", "memory_limit_default", "memory_request_default", "persistent_volume_claim_count",
		"pod_count", "replica_set_count", "replication_controller_count", "secret_count", "service_count", "stateful_set_count",
		"storage_request_limit",
	}
	if !slices.Equal(quotaNames, want) {
		t.Errorf("got %v\nwant %v", quotaNames, want)
	}
}

// TestRoundTrips holds that nothing is lost: what is read of any namespace and
// sent back changes nothing, and what is sent is read back.
func TestRoundTrips(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	for i := range 3000 {
		env := testEnvironment()
		env.clock = clock{zones: 1 + r.Int64N(3)}
		env.clock.sum = env.clock.zones*1000 + r.Int64N(9000)

		have := randomSettings(r)
		view, err := viewSettings(&have, env)
		if err != nil {
			t.Fatal(err)
		}
		text := marshal(t, view)
		for _, whole := range []bool{false, true} {
			got := *have.DeepCopy()
			if err := decodeSettings(t, text).apply(&got, env, whole); err != nil {
				t.Fatalf("%d: %v in %s", i, err, text)
			}
			if !equality.Semantic.DeepEqual(got, have) {
				t.Fatalf("%d, whole %t: sent back, %s\nmade %s\nof   %s", i, whole, text, marshal(t, got), marshal(t, have))
			}
		}

		// On another namespace, all that was sent is there.
		other := randomSettings(r)
		if err := decodeSettings(t, text).apply(&other, env, true); err != nil {
			t.Fatal(err)
		}
		again, err := viewSettings(&other, env)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(withoutOrder(again), withoutOrder(view)) {
			t.Fatalf("%d: sent %s\nread %s", i, text, marshal(t, again))
		}
	}
}

// withoutOrder makes views comparable whose subjects may be written in another
// case where they were there before.
func withoutOrder(v settingsView) settingsView {
	v.AccessList = slices.Clone(v.AccessList)
	for i, a := range v.AccessList {
		v.AccessList[i].Subject, v.AccessList[i].Domain = strings.ToLower(a.Subject), strings.ToLower(a.Domain)
	}
	return v
}

func randomSettings(r *rand.Rand) v1alpha1.NamespaceSettings {
	maybe := func() bool { return r.IntN(2) == 0 }
	pick := func(units ...string) *resource.Quantity {
		if maybe() {
			return nil
		}
		return quantity(fmt.Sprintf("%d%s", r.Int64N(5000), units[r.IntN(len(units))]))
	}
	cores := func() *resource.Quantity { return pick("", "m", "u", "k") }
	number := func() *resource.Quantity { return pick("", "m", "k", "Ki", "Mi", "G", "Ti") }
	count := func() *int64 {
		if maybe() {
			return nil
		}
		return ptr(r.Int64N(1000))
	}
	s := v1alpha1.NamespaceSettings{Description: []string{"", "shop", "ünï"}[r.IntN(3)]}
	if a := (v1alpha1.CPUAllocation{Limit: cores(), Reservation: cores()}); a != (v1alpha1.CPUAllocation{}) {
		s.CPU = &a
	}
	if a := (v1alpha1.MemoryAllocation{Limit: number(), Reservation: number()}); a != (v1alpha1.MemoryAllocation{}) {
		s.Memory = &a
	}
	if d := (v1alpha1.ContainerDefaults{CPURequest: cores(), CPULimit: cores(), MemoryRequest: number(), MemoryLimit: number()}); d != (v1alpha1.ContainerDefaults{}) {
		s.ContainerDefaults = &d
	}
	c := v1alpha1.ObjectCounts{}
	for _, f := range quotaFields {
		if f.count != nil {
			*f.count(&c) = count()
		}
	}
	if c.CronJobs = count(); c != (v1alpha1.ObjectCounts{}) {
		s.ObjectCounts = &c
	}
	for _, name := range []string{"gold", "silver", "gone"}[:r.IntN(3)] {
		s.StoragePolicies = append(s.StoragePolicies, v1alpha1.StoragePolicyLimit{Name: name, Limit: number()})
	}
	for _, name := range []string{"ada", "Bob", "cy"}[:r.IntN(4)] {
		s.Access = append(s.Access, v1alpha1.AccessEntry{
			Kind: []v1alpha1.SubjectKind{v1alpha1.UserSubject, v1alpha1.GroupSubject}[r.IntN(2)], Name: name,
			Domain: []string{"", "vsphere.local", "corp.example", v1alpha1.LocalDomain}[r.IntN(4)],
			Role:   []v1alpha1.AccessRole{v1alpha1.RoleOwner, v1alpha1.RoleEdit, v1alpha1.RoleView}[r.IntN(3)],
		})
	}
	s.VMClasses = []string{"large", "small"}[:r.IntN(3)]
	if len(s.VMClasses) == 0 {
		s.VMClasses = nil
	}
	return s
}
