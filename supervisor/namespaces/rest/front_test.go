package rest

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi"
	inventory "github.com/vmware/govmomi/find"
	vapirest "github.com/vmware/govmomi/vapi/rest"
	"github.com/vmware/govmomi/vapi/tags"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

const vcenterPassword = "correct horse"

// frontBench is a Front before a vCenter that knows nothing of namespaces.
type frontBench struct {
	*bench
	vcenter *vcsim.Server
	target  Target
	err     error
}

func newFrontBench(t *testing.T) *frontBench {
	t.Helper()
	vc, err := vcsim.New(vcsim.Config{Dir: filepath.Join(t.TempDir(), "vc"), AdminPassword: vcenterPassword, PasswordRounds: 1000, Clusters: []vcsim.Cluster{{Name: "C0", Hosts: []vcsim.Host{{Name: "h1"}}}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := vc.Close(); err != nil {
			t.Error(err)
		}
	})
	f := &frontBench{vcenter: vc, target: Target{Address: vc.URL().Host, CA: vc.CA(), Credentials: func(context.Context) (string, string, error) {
		return "Administrator@vsphere.local", vcenterPassword, nil
	}}}
	sv := testSupervisor()
	f.bench = newBench(t, interceptor.Funcs{}, sv)
	front := NewFront(Options{Client: f.client, Cluster: Cluster{Endpoint: "198.18.0.1:6443"}}, func(context.Context) (Target, error) { return f.target, f.err })
	f.server = httptest.NewTLSServer(front)
	t.Cleanup(f.server.Close)
	return f
}

// ask makes a call with a session's id and returns its status and body.
func (f *frontBench) ask(method, path, session, user, password string) (int, string) {
	f.t.Helper()
	req, err := http.NewRequestWithContext(f.t.Context(), method, f.server.URL+path, nil)
	if err != nil {
		f.t.Fatal(err)
	}
	if session != "" {
		req.Header.Set(sessionHeader, session)
	}
	if user != "" {
		req.SetBasicAuth(user, password)
	}
	res, err := f.server.Client().Do(req)
	if err != nil {
		f.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		f.t.Fatal(err)
	}
	return res.StatusCode, strings.TrimSpace(string(b))
}

// TestFront: vCenter's sessions and its privileges are what counts, and its own
// calls work through it.
func TestFront(t *testing.T) {
	f := newFrontBench(t)
	if err := f.vcenter.Users().Set("ann", vcenterPassword); err != nil {
		t.Fatal(err)
	}
	clusters := management + "/clusters"
	if status, body := f.ask("GET", clusters, "", "", ""); status != http.StatusUnauthorized || !strings.Contains(body, "UNAUTHENTICATED") {
		t.Errorf("without a session: %d %s", status, body)
	}
	if status, body := f.ask("GET", clusters, "not-a-session", "", ""); status != http.StatusUnauthorized {
		t.Errorf("with somebody's own session: %d %s", status, body)
	}
	if status, _ := f.ask("POST", "/api/session", "", "ann", "wrong"); status != http.StatusUnauthorized {
		t.Errorf("a wrong password: %d", status)
	}
	login := func(user string) string {
		status, body := f.ask("POST", "/api/session", "", user, vcenterPassword)
		if status != http.StatusCreated {
			t.Fatalf("login of %s: %d %s", user, status, body)
		}
		return strings.Trim(body, `"`)
	}
	admin, ann := login("Administrator@vsphere.local"), login("ann")

	// The Supervisor's cluster by its id in this vCenter.
	u := *f.vcenter.URL()
	u.Host, u.User = strings.TrimPrefix(f.server.URL, "https://"), url.UserPassword("Administrator@vsphere.local", vcenterPassword)
	vim, err := govmomi.NewClient(t.Context(), &u, true) // the test server's own certificate
	if err != nil {
		t.Fatalf("SOAP through the front: %v", err)
	}
	cluster, err := inventory.NewFinder(vim.Client).ClusterComputeResource(t.Context(), "/Atoll/host/C0")
	if err != nil {
		t.Fatal(err)
	}
	sv := testSupervisor()
	if err := f.client.Get(t.Context(), client.ObjectKeyFromObject(sv), sv); err != nil {
		t.Fatal(err)
	}
	sv.Status.Zones[0].Cluster = cluster.Reference().Value
	if err := f.client.Update(t.Context(), sv); err != nil {
		t.Fatal(err)
	}
	if status, body := f.ask("GET", clusters, admin, "", ""); status != http.StatusOK || !strings.Contains(body, cluster.Reference().Value) {
		t.Errorf("the administrator's clusters: %d %s", status, body)
	}
	if status, body := f.ask("GET", clusters, ann, "", ""); status != http.StatusOK || body != "[]" {
		t.Errorf("clusters of a user without rights: %d %s", status, body)
	}
	if status, body := f.ask("GET", management+"/virtual-machine-classes", ann, "", ""); status != http.StatusForbidden || !strings.Contains(body, "ann@vsphere.local lacks") {
		t.Errorf("VM classes of a user without rights: %d %s", status, body)
	}
	if status, body := f.ask("GET", management+"/virtual-machine-classes", admin, "", ""); status != http.StatusOK {
		t.Errorf("VM classes: %d %s", status, body)
	}
	rc := vapirest.NewClient(vim.Client)
	if err := rc.Login(t.Context(), u.User); err != nil {
		t.Fatalf("REST through the front: %v", err)
	}
	if _, err := tags.NewManager(rc).CreateCategory(t.Context(), &tags.Category{Name: "c", Cardinality: "SINGLE"}); err != nil {
		t.Errorf("a call of vCenter's own: %v", err)
	}
	if status, _ := f.ask("DELETE", "/api/session", admin, "", ""); status != http.StatusNoContent {
		t.Errorf("logout: %d", status)
	}
	if status, _ := f.ask("GET", clusters, admin, "", ""); status != http.StatusUnauthorized {
		t.Errorf("after the logout: %d", status)
	}
	if status, _ := f.ask("GET", "/ui/", ann, "", ""); status != http.StatusNotFound {
		t.Errorf("a path that is not passed on: %d", status)
	}
}

// TestFrontWithoutVCenter: what is not known is not refused for good.
func TestFrontWithoutVCenter(t *testing.T) {
	f := newFrontBench(t)
	status, session := f.ask("POST", "/api/session", "", "Administrator@vsphere.local", vcenterPassword)
	if status != http.StatusCreated {
		t.Fatal(session)
	}
	session = strings.Trim(session, `"`)
	good := f.target
	for what, c := range map[string]struct {
		target Target
		err    error
		path   string
		status int
	}{
		"nothing listens":  {target: Target{Address: "127.0.0.1:1", CA: good.CA}, path: management + "/clusters", status: http.StatusServiceUnavailable},
		"passed on":        {target: Target{Address: "127.0.0.1:1", CA: good.CA}, path: "/api/session", status: http.StatusServiceUnavailable},
		"not trusted":      {target: Target{Address: good.Address, Thumbprint: strings.Repeat("00:", 31) + "00"}, path: "/api/session", status: http.StatusServiceUnavailable},
		"no Supervisor":    {err: problemf(errdefs.ErrUnavailable, "There is no Supervisor."), path: management + "/clusters", status: http.StatusServiceUnavailable},
		"the embedded one": {target: Target{Address: good.Address, CA: good.CA, Serves: true}, path: management + "/clusters", status: http.StatusNotFound},
		"refused": {target: Target{Address: good.Address, CA: good.CA, Credentials: func(context.Context) (string, string, error) {
			return "Administrator@vsphere.local", "wrong", nil
		}}, path: management + "/virtual-machine-classes", status: http.StatusServiceUnavailable},
	} {
		t.Run(what, func(t *testing.T) {
			f.target, f.err = c.target, c.err
			if status, body := f.ask("GET", c.path, session, "", ""); status != c.status || strings.Contains(body, vcenterPassword) {
				t.Errorf("%d %s, want %d", status, body, c.status)
			}
		})
	}
}
