package client

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/openatoll/atoll/supervisor/login/loginapi"
)

func TestParseTarget(t *testing.T) {
	for in, want := range map[string]string{
		"198.18.0.1":                "https://198.18.0.1:6444 198.18.0.1",
		"sv.example.com":            "https://sv.example.com:6444 sv.example.com",
		"https://sv.example.com/":   "https://sv.example.com:6444 sv.example.com",
		"sv.example.com:443":        "https://sv.example.com:443 sv.example.com:443",
		"https://198.18.0.1:6444":   "https://198.18.0.1:6444 198.18.0.1",
		"2001:db8::1":               "https://[2001:db8::1]:6444 2001:db8::1",
		"[2001:db8::1]:7":           "https://[2001:db8::1]:7 [2001:db8::1]:7",
		"":                          "",
		"http://sv.example.com":     "",
		"https://":                  "",
		"sv.example.com/path":       "",
		"ada:secret@sv.example.com": "",
		"sv.example.com:0":          "",
		"sv.example.com:65536":      "",
		"sv example":                "",
		":6444":                     "",
		"ftp://x":                   "",
	} {
		got, err := parseTarget(in)
		if want == "" {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%q: %+v, %v", in, got, err)
			}
			continue
		}
		if have := got.url("") + " " + got.name(); err != nil || have != want {
			t.Errorf("%q: %s, %v; want %s", in, have, err, want)
		}
	}
}

// hers is a kubeconfig that somebody has tended by hand.
const hers = `# my clusters
apiVersion: v1
kind: Config
x-note: {kept: true}   # no field of Kubernetes
preferences: {}
clusters:
# the one at work
- name: work
  cluster: &work
    server: https://work.example:6443
    certificate-authority: ca.crt
    proxy-url: socks5://localhost:1080
    x-owner: team # nor this
- cluster: *work
  name: work-again
users:
- name: me
  user:
    exec: {apiVersion: client.authentication.k8s.io/v1, command: aws, interactiveMode: Never}
contexts:
- context: {cluster: work, user: me}
  name: work
- name: shop # not ours
  context: {cluster: work, user: me, namespace: shop}
current-context: work
`

func write(t *testing.T, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

var here = &server{target: target{"sv.example.com", loginapi.DefaultPort}}

// signIn does what keep does, without a server.
func signIn(t *testing.T, path, user, token string, namespaces ...string) (all []string, current string) {
	t.Helper()
	err := edit(path, func(d *document, have *clientcmdapi.Config) (err error) {
		l := loginapi.Login{Token: token, User: user, Expires: time.Unix(1e9, 0), APIServerPort: 6443, CertificateAuthority: "PEM"}
		all, current, _, err = here.merge(d, have, l, namespaces, "")
		if err == nil {
			d.setCurrent(current)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all, current
}

func signOut(t *testing.T, path string) []login {
	t.Helper()
	var out []login
	if err := edit(path, func(d *document, have *clientcmdapi.Config) error {
		out = takeOut(d, have, "")
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestMergeLosesNothing: after a login and a logout the file is as it was, but
// for its current context.
func TestMergeLosesNothing(t *testing.T) {
	// What the YAML library makes of it: indentation alone.
	normal := write(t, hers, 0o600)
	if err := edit(normal, func(d *document, _ *clientcmdapi.Config) error { d.touched["x"] = true; return nil }); err != nil {
		t.Fatal(err)
	}
	for _, keep := range []string{"# my clusters", "x-note: {kept: true} # no field of Kubernetes", "# the one at work", "x-owner: team # nor this", "&work", "cluster: *work", "# not ours"} {
		if !strings.Contains(read(t, normal), keep) {
			t.Errorf("%q is lost in\n%s", keep, read(t, normal))
		}
	}
	path := write(t, hers, 0o644)
	all, current := signIn(t, path, "ada@vsphere.local", "t1", "ops", "shop")
	// "shop" is taken by another cluster's context.
	if fmt.Sprint(all) != "[sv.example.com ops shop-sv.example.com]" || current != "sv.example.com" {
		t.Errorf("contexts %v, current %s", all, current)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	have, err := clientcmd.LoadFromFile(path)
	if err != nil {
		t.Fatal(err)
	}
	c, u := have.Contexts["shop-sv.example.com"], have.AuthInfos["atoll:sv.example.com:ada@vsphere.local"]
	if c == nil || u == nil || c.Namespace != "shop" || c.AuthInfo != "atoll:sv.example.com:ada@vsphere.local" || u.Token != "t1" {
		t.Fatalf("context %+v, user %+v", c, u)
	}
	cl := have.Clusters[c.Cluster]
	if cl == nil || cl.Server != "https://sv.example.com:6443" || string(cl.CertificateAuthorityData) != "PEM" || cl.InsecureSkipTLSVerify {
		t.Errorf("cluster %+v", cl)
	}
	if m, ok := markOf(u); !ok || m.Server != "https://sv.example.com:6444" || m.User != "ada@vsphere.local" || m.Expires.Unix() != 1e9 {
		t.Errorf("mark %+v, %v", m, ok)
	}
	out := signOut(t, path)
	if len(out) != 1 || out[0].token != "t1" || string(out[0].ca) != "PEM" || out[0].target != here.target {
		t.Errorf("signed out: %+v", out)
	}
	want := strings.Replace(read(t, normal), "current-context: work", `current-context: ""`, 1)
	if got := read(t, path); got != want {
		t.Errorf("left:\n%s\nwant:\n%s", got, want)
	}
}

// TestSignInAgain: the contexts follow what the user may use, and what he has
// set in them by hand stays.
func TestSignInAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "config")
	if all, current := signIn(t, path, "ada@vsphere.local", "t1", "ops"); fmt.Sprint(all) != "[sv.example.com ops]" || current != "ops" {
		t.Errorf("the first: %v, current %s", all, current)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if err := edit(path, func(d *document, _ *clientcmdapi.Config) error {
		d.set(contexts, "sv.example.com", [][2]string{{"namespace", "mine"}})
		d.set(clusters, here.target.cluster(), [][2]string{{"proxy-url", "http://proxy:1"}})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if all, current := signIn(t, path, "ada@vsphere.local", "t2", "ops", "shop"); fmt.Sprint(all) != "[sv.example.com ops shop]" || current != "ops" {
		t.Errorf("a namespace more: %v, current %s", all, current)
	}
	if all, current := signIn(t, path, "ada@vsphere.local", "t3", "lab", "shop"); fmt.Sprint(all) != "[sv.example.com lab shop]" || current != "sv.example.com" {
		t.Errorf("without the current one: %v, current %s", all, current)
	}
	have, err := clientcmd.LoadFromFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if have.Contexts["ops"] != nil || have.Contexts["sv.example.com"].Namespace != "mine" || have.Clusters[here.target.cluster()].ProxyURL != "http://proxy:1" {
		t.Errorf("have %+v", have)
	}
	signIn(t, path, "bob@vsphere.local", "t4", "lab")
	if have, err = clientcmd.LoadFromFile(path); err != nil {
		t.Fatal(err)
	}
	if len(have.AuthInfos) != 1 || len(have.Contexts) != 2 || have.Contexts["lab"].AuthInfo != "atoll:sv.example.com:bob@vsphere.local" {
		t.Errorf("another user: %+v", have)
	}
}

// TestOddKubeconfigs: a link stays a link, JSON stays readable, and what cannot
// be read is not touched.
func TestOddKubeconfigs(t *testing.T) {
	target := write(t, hers, 0o600)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	signIn(t, link, "ada@vsphere.local", "t1", "ops")
	if st, err := os.Lstat(link); err != nil || st.Mode()&os.ModeSymlink == 0 || !strings.Contains(read(t, target), "token: t1") {
		t.Errorf("link: %v, %v", st.Mode(), err)
	}
	for name, text := range map[string]string{
		"JSON":  `{"apiVersion":"v1","kind":"Config","clusters":[{"name":"work","cluster":{"server":"https://work"}}],"contexts":null,"users":[],"current-context":"work"}`,
		"empty": "", "comment": "# nothing yet\n", "null": "null\n",
	} {
		path := write(t, text, 0o600)
		signIn(t, path, "ada@vsphere.local", "t1", "ops", "shop")
		have, err := clientcmd.LoadFromFile(path)
		if err != nil || len(have.Contexts) != 3 || have.CurrentContext != "sv.example.com" || (name == "JSON") != (have.Clusters["work"] != nil) {
			t.Errorf("%s: %+v, %v\n%s", name, have, err, read(t, path))
		}
	}
	for name, text := range map[string]string{
		"no YAML": "a: [", "no kubeconfig": "apiVersion: v1\nkind: Secret\n", "a list": "- a\n", "two": hers + "---\n" + hers, "text": "hello",
	} {
		path := write(t, text, 0o640)
		err := edit(path, func(d *document, _ *clientcmdapi.Config) error { d.set(users, "u", nil); return nil })
		if err == nil || !strings.Contains(err.Error(), path) || read(t, path) != text {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(path + ".lock"); err == nil {
			t.Errorf("%s: the lock is left", name)
		}
	}
}

// TestManyWriters: kubectl's lock keeps writers apart.
func TestManyWriters(t *testing.T) {
	path := write(t, hers, 0o600)
	held, err := lock(path)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if err := edit(path, func(d *document, _ *clientcmdapi.Config) error {
				d.set(users, fmt.Sprint("u", i), [][2]string{{"token", "t"}})
				return nil
			}); err != nil {
				t.Error(err)
			}
		})
	}
	held()
	wg.Wait()
	have, err := clientcmd.LoadFromFile(path)
	if err != nil || len(have.AuthInfos) != 9 {
		t.Errorf("%d users, %v", len(have.AuthInfos), err)
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(path), "*"))
	if err != nil || len(left) != 1 {
		t.Errorf("beside the file: %v, %v", left, err)
	}
}

// TestMistakesAreNotWritten: a change that goes beyond what it says is refused.
func TestMistakesAreNotWritten(t *testing.T) {
	path := write(t, hers, 0o600)
	err := edit(path, func(d *document, _ *clientcmdapi.Config) error {
		d.set(users, "u", nil)
		field(d.entry(clusters, "work"), "server").Value = "https://elsewhere"
		return nil
	})
	if !errdefs.IsInternal(err) || read(t, path) != hers {
		t.Errorf("%v", err)
	}
}
