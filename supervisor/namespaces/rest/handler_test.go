package rest

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// fakeVCenter stands for vCenter's users: "admin" may do everything, others what
// grants has, by "user privilege kind/id".
type fakeVCenter struct {
	grants []string
	gone   []string // ids of entities that are not there
	down   bool
}

func (f *fakeVCenter) Caller(r *http.Request) (string, error) {
	user, ok := strings.CutPrefix(r.Header.Get("vmware-api-session-id"), "of-")
	if !ok {
		return "", errdefs.ErrUnauthenticated
	}
	return user, nil
}

func (f *fakeVCenter) Allowed(_ context.Context, user, privilege string, entities []Entity) ([]bool, error) {
	if f.down {
		return nil, problemf(errdefs.ErrUnavailable, "vCenter does not answer.")
	}
	var out []bool
	for _, e := range entities {
		if slices.Contains(f.gone, e.ID) {
			return nil, problemf(errdefs.ErrNotFound, "There is no %s.", e)
		}
		out = append(out, user == "admin" || slices.Contains(f.grants, user+" "+privilege+" "+e.Kind+"/"+e.ID))
	}
	return out, nil
}

type bench struct {
	t       *testing.T
	server  *httptest.Server
	vcenter *fakeVCenter
	client  client.Client
	session string
}

func testSupervisor() *v1alpha1.Supervisor {
	return &v1alpha1.Supervisor{
		ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.SupervisorName, UID: "sv-uid"},
		Spec:       v1alpha1.SupervisorSpec{SSODomain: "vsphere.local", Zones: []v1alpha1.Zone{{Name: "zone-a", Cluster: "C0"}}},
		Status: v1alpha1.SupervisorStatus{
			Zones: []v1alpha1.ZoneStatus{{Name: "zone-a", Cluster: "domain-c8", Path: "/DC0/host/C0", MHzPerCore: 2294, CPU: quantity("8"), Memory: quantity("16Gi")}},
			Conditions: []metav1.Condition{
				{Type: v1alpha1.ConditionReady, Status: metav1.ConditionTrue, Reason: v1alpha1.ReasonSynced},
				{Type: v1alpha1.ConditionConnected, Status: metav1.ConditionTrue, Reason: v1alpha1.ReasonSynced},
			},
		},
	}
}

func namespace(name string, pools ...string) *v1alpha1.SupervisorNamespace {
	ns := &v1alpha1.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: name, UID: "uid-of-" + "x"}}
	for _, id := range pools {
		ns.Status.Pools = append(ns.Status.Pools, v1alpha1.PoolStatus{Zone: "zone-a", ID: id})
	}
	return ns
}

func newBench(t *testing.T, funcs interceptor.Funcs, objects ...client.Object) *bench {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{v1alpha1.AddToScheme, corev1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	b := &bench{t: t, vcenter: &fakeVCenter{}}
	b.client = fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).
		WithStatusSubresource(&v1alpha1.SupervisorNamespace{}).WithInterceptorFuncs(funcs).Build()
	for _, o := range objects {
		if ns, ok := o.(*v1alpha1.SupervisorNamespace); ok && ns.Status.Pools != nil {
			have := &v1alpha1.SupervisorNamespace{}
			if err := b.client.Get(t.Context(), client.ObjectKeyFromObject(ns), have); err != nil {
				t.Fatal(err)
			}
			have.Status = ns.Status
			if err := b.client.Status().Update(t.Context(), have); err != nil {
				t.Fatal(err)
			}
		}
	}
	b.server = httptest.NewServer(New(Options{
		Client: b.client, VCenter: b.vcenter,
		Cluster: Cluster{Endpoint: "198.18.0.1:6443", Version: "v1.36.3", Services: "10.96.0.0/16"},
		Logger:  slog.New(slog.DiscardHandler),
	}))
	t.Cleanup(b.server.Close)
	b.as("admin")
	return b
}

func (b *bench) as(user string) *bench {
	b.session = "of-" + user
	return b
}

// do makes a call and returns status and body.
func (b *bench) do(method, path, body string) (int, string) {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.t.Context(), method, b.server.URL+path, strings.NewReader(body))
	if err != nil {
		b.t.Fatal(err)
	}
	if b.session != "" {
		req.Header.Set("vmware-api-session-id", b.session)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer res.Body.Close()
	out, err := io.ReadAll(res.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	return res.StatusCode, string(out)
}

// want makes a call that has to answer with a status and, if it fails, with an
// error_type and a message that has a text.
func (b *bench) want(method, path, body string, status int, kind, text string) string {
	b.t.Helper()
	got, out := b.do(method, path, body)
	if got != status {
		b.t.Fatalf("%s %s %s: %d %s, want %d", method, path, body, got, out, status)
	}
	if kind == "" {
		return out
	}
	var e struct {
		Kind     string    `json:"error_type"`
		Messages []message `json:"messages"`
	}
	d := json.NewDecoder(bytes.NewReader([]byte(out)))
	if err := d.Decode(&e); err != nil || e.Kind != kind || len(e.Messages) != 1 || !strings.Contains(e.Messages[0].Default, text) || e.Messages[0].ID == "" || e.Messages[0].Args == nil {
		b.t.Fatalf("%s %s %s: %s (%v), want %s with %q", method, path, body, out, err, kind, text)
	}
	return out
}

func (b *bench) get(name string) *v1alpha1.SupervisorNamespace {
	b.t.Helper()
	ns := &v1alpha1.SupervisorNamespace{}
	if err := b.client.Get(b.t.Context(), client.ObjectKey{Name: name}, ns); err != nil {
		b.t.Fatal(err)
	}
	return ns
}

func TestSession(t *testing.T) {
	b := newBench(t, interceptor.Funcs{}, testSupervisor())
	for _, b.session = range []string{"", "made-up"} {
		for _, r := range Routes() {
			b.want(r.Method, r.Path, "", 401, "UNAUTHENTICATED", "POST /api/session")
		}
	}
}

func TestNoSuchOperation(t *testing.T) {
	b := newBench(t, interceptor.Funcs{}, testSupervisor(), namespace("shop", "resgroup-1"))
	for _, c := range [][2]string{
		{"GET", "/api/vcenter/namespaces/nothing"},
		{"TRACE", instances},
		{"POST", instances + "/shop"},
		{"POST", management + "/clusters/domain-c8?action=explode"},
		{"GET", instances + "?action=list"},
		{"POST", "/api/vcenter/storage/policies/" + goldID},
	} {
		b.want(c[0], c[1], "", 404, "OPERATION_NOT_FOUND", "There is no operation")
	}
}

// TestUnsupported holds that what Atoll has nothing for is refused with the
// alternative.
func TestUnsupported(t *testing.T) {
	b := newBench(t, interceptor.Funcs{}, testSupervisor())
	for _, c := range [][3]string{
		{"POST", management + "/clusters/domain-c8?action=enable", "Supervisor object"},
		{"POST", management + "/clusters/domain-c8?action=disable", "Supervisor object"},
		{"POST", management + "/supervisors/default?action=enable_on_zones", "Supervisor object"},
		{"GET", management + "/clusters/domain-c8/networks", "own network"},
		{"GET", management + "/edge-cluster-compatibility", "own network"},
		{"POST", management + "/software/clusters/domain-c8?action=upgrade", "new version"},
		{"POST", management + "/supervisor-services", "kubectl"},
		{"POST", instances + "/shop/registervm", "makes their VMs itself"},
	} {
		b.want(c[0], c[1], "{}", 400, "UNSUPPORTED", c[2])
	}
}

func TestURLParts(t *testing.T) {
	for _, p := range Patterns() {
		if !strings.HasPrefix(p, "/api/vcenter/") {
			t.Errorf("pattern %s", p)
		}
	}
	for _, r := range Routes() {
		covered := false
		for _, p := range Patterns() {
			covered = covered || r.Path == p || strings.HasSuffix(p, "/") && strings.HasPrefix(r.Path, p)
		}
		if !covered {
			t.Errorf("%s is under no pattern that a server mounts", r)
		}
		if _, err := url.Parse(r.Path); err != nil {
			t.Error(err)
		}
	}
}
