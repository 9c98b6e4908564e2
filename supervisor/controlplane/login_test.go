package controlplane

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	jose "gopkg.in/go-jose/go-jose.v2"
	"gopkg.in/go-jose/go-jose.v2/jwt"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/supervisor/login/client"
)

const adasPassword = "correct horse battery staple"

// TestLogin signs users of a vCenter in at a whole control plane, and works with
// what they get.
func TestLogin(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a control plane")
	}
	cfg := testConfig(t)
	cfg.VCenter = &VCenter{Port: DefaultVCenterPort}
	s := startServer(t, cfg)
	admin := clientFrom(t, restFrom(t, cfg.Kubeconfig()))
	kubeconfig := filepath.Join(t.TempDir(), "config")
	l := &loginTest{t: t, cfg: cfg, kubeconfig: kubeconfig}

	l.createUsers()
	l.createNamespaces(admin)
	l.checkTrust()
	l.checkAccess()
	l.checkTokens(admin)
	l.checkLockout()
	l.checkWithoutVCenter()
	first := l.token("shop")
	l.checkLogout()

	// A crash forgets neither who is signed in nor who signed out.
	if _, err := l.login("ada@vsphere.local", adasPassword); err != nil {
		t.Fatal(err)
	}
	s.kill(t)
	startServer(t, cfg)
	if err := l.listPods("shop"); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	if err := l.listPodsWith(first, "shop"); !apierrors.IsUnauthorized(err) {
		t.Errorf("after a restart, a token that was given back: %v", err)
	}
	l.checkSecrets()
}

type loginTest struct {
	t          *testing.T
	cfg        Config
	kubeconfig string
}

func (l *loginTest) options(user, password string) client.Options {
	return client.Options{
		Server: l.cfg.loginURL(), User: user, CAFile: l.cfg.ClientCAFile(), Kubeconfig: l.kubeconfig,
		Password: func() (string, error) { return password, nil },
	}
}

func (l *loginTest) login(user, password string) (client.Result, error) {
	return client.Login(l.t.Context(), l.options(user, password))
}

// token is what the kubeconfig has for a context.
func (l *loginTest) token(kubeContext string) string {
	l.t.Helper()
	have, err := clientcmd.LoadFromFile(l.kubeconfig)
	if err != nil {
		l.t.Fatal(err)
	}
	c := have.Contexts[kubeContext]
	if c == nil {
		l.t.Fatalf("no context %s", kubeContext)
	}
	return have.AuthInfos[c.AuthInfo].Token
}

// listPods does what `kubectl --context CONTEXT get pods` does.
func (l *loginTest) listPods(kubeContext string) error {
	l.t.Helper()
	loaded := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(
		&clientcmd.ClientConfigLoadingRules{ExplicitPath: l.kubeconfig}, &clientcmd.ConfigOverrides{CurrentContext: kubeContext})
	cfg, err := loaded.ClientConfig()
	if err != nil {
		l.t.Fatal(err)
	}
	namespace, _, err := loaded.Namespace()
	if err != nil {
		l.t.Fatal(err)
	}
	_, err = clientFrom(l.t, cfg).CoreV1().Pods(namespace).List(l.t.Context(), metav1.ListOptions{})
	return err
}

// listPodsWith takes any token and namespace.
func (l *loginTest) listPodsWith(token, namespace string) error {
	l.t.Helper()
	cfg := restFrom(l.t, l.cfg.Kubeconfig())
	cfg.CertData, cfg.KeyData, cfg.BearerToken = nil, nil, token
	_, err := clientFrom(l.t, cfg).CoreV1().Pods(namespace).List(l.t.Context(), metav1.ListOptions{})
	return err
}

// createUsers makes Ada, in a group, and others, by what `atoll vcenter user`
// calls.
func (l *loginTest) createUsers() {
	t := l.t
	t.Helper()
	for _, u := range []VCenterUser{{Name: "Ada", Groups: []string{"Shop-Devs"}}, {Name: "bob@vsphere.local"}, {Name: "eve"}, {Name: "gone"}} {
		if err := SetVCenterUser(t.Context(), l.cfg, u, adasPassword); err != nil {
			t.Fatal(err)
		}
	}
	if err := RemoveVCenterUser(t.Context(), l.cfg, "GONE@vsphere.local"); err != nil {
		t.Error(err)
	}
	for name, want := range map[string]func(error) bool{
		"gone": errdefs.IsNotFound, "Administrator": errdefs.IsPermissionDenied, `VSPHERE.LOCAL\` + vcenterUser: errdefs.IsPermissionDenied, "a@b": errdefs.IsInvalidArgument,
	} {
		if err := RemoveVCenterUser(t.Context(), l.cfg, name); !want(err) {
			t.Errorf("remove %s: %v", name, err)
		}
	}
	for user, password := range map[string]string{vcenterUser: "p", "x": "", "a/b": "p"} {
		if err := SetVCenterUser(t.Context(), l.cfg, VCenterUser{Name: user}, password); !errdefs.IsPermissionDenied(err) && !errdefs.IsInvalidArgument(err) {
			t.Errorf("set %s: %v", user, err)
		}
	}
	users, err := VCenterUsers(t.Context(), l.cfg)
	want := "[{Ada@vsphere.local [Shop-Devs@vsphere.local]} {Administrator@vsphere.local [Administrators@vsphere.local]} {atoll-supervisor@vsphere.local []} {bob@vsphere.local []} {eve@vsphere.local []}]"
	if err != nil || fmt.Sprint(users) != want {
		t.Errorf("%v, %v; want %s", users, err, want)
	}
}

// checkWithoutVCenter: while vCenter cannot be reached nobody can sign in, and
// nobody is told that the password is wrong.
func (l *loginTest) checkWithoutVCenter() {
	t := l.t
	t.Helper()
	dyn, err := dynamic.NewForConfig(restFrom(t, l.cfg.Kubeconfig()))
	if err != nil {
		t.Fatal(err)
	}
	move := func(server string) {
		t.Helper()
		patch := fmt.Sprintf(`{"spec":{"vCenter":{"server":%q}}}`, server)
		_, err := dyn.Resource(v1alpha1.SchemeGroupVersion.WithResource("supervisors")).Patch(t.Context(), v1alpha1.SupervisorName, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(supervisorCacheTime) // for that long it is not read again
	}
	move("127.0.0.1:1")
	if _, err := client.Login(t.Context(), l.elsewhere("bob@vsphere.local")); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "is not known") {
		t.Errorf("without vCenter: %v", err)
	}
	move(l.cfg.VCenterAddress().String())
	if _, err := client.Login(t.Context(), l.elsewhere("bob@vsphere.local")); err != nil {
		t.Errorf("with vCenter again: %v", err)
	}
}

// createNamespaces makes shop, a SupervisorNamespace that a group may edit; ops,
// which ada may view by a binding made by hand; and lab, which only bob may.
func (l *loginTest) createNamespaces(admin kubernetes.Interface) {
	l.t.Helper()
	dyn, err := dynamic.NewForConfig(restFrom(l.t, l.cfg.Kubeconfig()))
	if err != nil {
		l.t.Fatal(err)
	}
	shop := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": v1alpha1.GroupVersion, "kind": "SupervisorNamespace", "metadata": map[string]any{"name": "shop"},
		"spec": map[string]any{"access": []any{map[string]any{"kind": "Group", "name": "Shop-Devs", "role": "edit"}}},
	}}
	if _, err := dyn.Resource(v1alpha1.SchemeGroupVersion.WithResource("supervisornamespaces")).Create(l.t.Context(), shop, metav1.CreateOptions{}); err != nil {
		l.t.Fatal(err)
	}
	for namespace, b := range map[string]struct{ kind, name, role string }{
		"ops": {rbacv1.UserKind, "sso:ada@vsphere.local", "view"},
		"lab": {rbacv1.UserKind, "sso:bob@vsphere.local", "edit"},
	} {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}
		if _, err := admin.CoreV1().Namespaces().Create(l.t.Context(), ns, metav1.CreateOptions{}); err != nil {
			l.t.Fatal(err)
		}
		binding := &rbacv1.RoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: "access"},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: b.role},
			Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: b.kind, Name: b.name}},
		}
		if _, err := admin.RbacV1().RoleBindings(namespace).Create(l.t.Context(), binding, metav1.CreateOptions{}); err != nil {
			l.t.Fatal(err)
		}
	}
	eventually(l.t, "the access list of shop", func() error {
		bindings, err := admin.RbacV1().RoleBindings("shop").List(l.t.Context(), metav1.ListOptions{})
		if err == nil && !slices.ContainsFunc(bindings.Items, func(b rbacv1.RoleBinding) bool {
			return len(b.Subjects) == 1 && b.Subjects[0].Kind == rbacv1.GroupKind && b.Subjects[0].Name == "sso:shop-devs@vsphere.local"
		}) {
			err = fmt.Errorf("not in %+v", bindings.Items)
		}
		return err
	})
}

// checkTrust: nobody is asked for a password before the server is trusted.
func (l *loginTest) checkTrust() {
	t := l.t
	t.Helper()
	for name, ca := range map[string]string{"another authority": l.cfg.pkiPath("front-proxy-ca.crt"), "the host's authorities": ""} {
		o := l.options("ada@vsphere.local", adasPassword)
		o.CAFile = ca
		o.Password = func() (string, error) {
			t.Errorf("%s: asked for the password", name)
			return "", errors.New("not asked for")
		}
		if _, err := client.Login(t.Context(), o); !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "--ca-file") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.Stat(l.kubeconfig); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a kubeconfig was made all the same: %v", err)
	}
}

// checkAccess: the contexts are those that RoleBindings open, and only they are
// open.
func (l *loginTest) checkAccess() {
	t := l.t
	t.Helper()
	r, err := l.login(`VSPHERE.LOCAL\aDA`, adasPassword)
	if err != nil {
		t.Fatal(err)
	}
	host := l.cfg.Address.String()
	if got := strings.Join(r.Contexts, " "); got != host+" ops shop" || r.User != "ada@vsphere.local" || r.Current != host || r.Warning != "" {
		t.Errorf("login: %+v", r)
	}
	if left := time.Until(r.Expires); left > 10*time.Hour || left < 10*time.Hour-time.Minute {
		t.Errorf("expires in %s", left)
	}
	if st, err := os.Stat(l.kubeconfig); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("kubeconfig: %v, %v", st, err)
	}
	token := l.token("shop")
	for name, err := range map[string]error{"shop": l.listPods("shop"), "ops": l.listPods("ops")} {
		if err != nil {
			t.Errorf("in %s: %v", name, err)
		}
	}
	for _, namespace := range []string{"lab", "kube-system", ""} {
		if err := l.listPodsWith(token, namespace); !apierrors.IsForbidden(err) {
			t.Errorf("in namespace %q: %v", namespace, err)
		}
	}
	if err := l.listPodsWith(token, "lab"); err == nil || !strings.Contains(err.Error(), `"sso:ada@vsphere.local"`) {
		t.Errorf("forbidden, to whom? %v", err)
	}
}

// checkTokens: the API server takes no token that is not good.
func (l *loginTest) checkTokens(admin kubernetes.Interface) {
	t := l.t
	t.Helper()
	now := time.Now()
	good := l.sign(now.Add(-time.Hour), now.Add(time.Hour))
	if err := l.listPodsWith(good, "ops"); err != nil {
		t.Errorf("a token made here, by the keys in the data directory: %v", err)
	}
	parts := strings.Split(good, ".")
	for name, token := range map[string]string{
		"expired":         l.sign(now.Add(-11*time.Hour), now.Add(-time.Second)),
		"of the future":   l.sign(now.Add(time.Hour), now.Add(2*time.Hour)),
		"wrong signature": parts[0] + "." + parts[1] + "." + strings.Repeat("A", len(parts[2])),
		"no token":        "abc",
	} {
		if err := l.listPodsWith(token, "ops"); !apierrors.IsUnauthorized(err) {
			t.Errorf("a token that is %s: %v", name, err)
		}
	}
	// Service accounts' tokens do not go through the login server.
	_, err := admin.CoreV1().ServiceAccounts("ops").Get(t.Context(), "default", metav1.GetOptions{})
	if err != nil {
		t.Errorf("the administrator: %v", err)
	}
}

// sign makes a token of ada's.
func (l *loginTest) sign(issued, expires time.Time) string {
	t := l.t
	t.Helper()
	files, err := filepath.Glob(l.cfg.pkiPath("login", "*.key"))
	if err != nil || len(files) != 1 {
		t.Fatalf("keys: %v, %v", files, err)
	}
	if st, err := os.Stat(files[0]); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%s: %v, %v", files[0], st, err)
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	key, err := x509.ParseECPrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	_, id, _ := strings.Cut(strings.TrimSuffix(filepath.Base(files[0]), ".key"), "-")
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: id}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(jwt.Claims{
		Issuer: l.cfg.loginURL(), Subject: "ada@vsphere.local", Audience: jwt.Audience{"atoll-supervisor"}, ID: strings.Repeat("0", 32),
		IssuedAt: jwt.NewNumericDate(issued), Expiry: jwt.NewNumericDate(expires),
	}).CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// checkLockout: wrong passwords all look alike, and five of them lock.
func (l *loginTest) checkLockout() {
	t := l.t
	t.Helper()
	tries := []string{"eve@vsphere.local", "eve@vsphere.local", `VSPHERE.LOCAL\EVE`, "Eve", "eve@vsphere.local", "nobody@vsphere.local"}
	errs, took := make([]error, len(tries)), make([]time.Duration, len(tries))
	var wg sync.WaitGroup
	for i, user := range tries {
		wg.Go(func() {
			began := time.Now()
			o := l.options(user, "wrong")
			_, errs[i] = client.Login(t.Context(), o)
			took[i] = time.Since(began)
		})
	}
	wg.Wait()
	for i, err := range errs {
		if !errdefs.IsUnauthorized(err) || err.Error() != errs[0].Error() || took[i] < time.Second {
			t.Errorf("%s with a wrong password, after %s: %v", tries[i], took[i], err)
		}
	}
	if _, err := l.login("eve@vsphere.local", adasPassword); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "wait") {
		t.Errorf("the right one after five wrong ones: %v", err)
	}
	if _, err := client.Login(t.Context(), l.elsewhere("bob@vsphere.local")); err != nil {
		t.Errorf("another user: %v", err)
	}
}

// elsewhere is a login into a kubeconfig of its own.
func (l *loginTest) elsewhere(user string) client.Options {
	o := l.options(user, adasPassword)
	o.Kubeconfig = filepath.Join(l.t.TempDir(), "config")
	return o
}

// checkLogout: the token is good no more, and its contexts are gone.
func (l *loginTest) checkLogout() {
	t := l.t
	t.Helper()
	token := l.token("shop")
	done, err := client.Logout(context.Background(), "", l.kubeconfig)
	if err != nil || len(done) != 1 || done[0].NotRevoked != nil || done[0].User != "ada@vsphere.local" {
		t.Fatalf("logout: %+v, %v", done, err)
	}
	have, err := clientcmd.LoadFromFile(l.kubeconfig)
	if err != nil || len(have.Clusters)+len(have.Contexts)+len(have.AuthInfos) != 0 || have.CurrentContext != "" {
		t.Errorf("left in the kubeconfig: %+v, %v", have, err)
	}
	eventually(t, "401 for the token that was given back", func() error {
		if err := l.listPodsWith(token, "shop"); !apierrors.IsUnauthorized(err) {
			return errors.New("it is still good")
		}
		return nil
	})
}

// checkSecrets: no password and no token is in any log.
func (l *loginTest) checkSecrets() {
	t := l.t
	t.Helper()
	log, err := os.ReadFile(l.cfg.DataDir + ".log")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`msg="signed in"`, `msg="login refused"`, `msg="signed out"`, "user=ada@vsphere.local"} {
		if !strings.Contains(string(log), want) {
			t.Errorf("the log has no %s", want)
		}
	}
	audit, err := os.ReadFile(filepath.Join(l.cfg.DataDir, "log", "audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	head, _, _ := strings.Cut(l.token("shop"), ".")
	for name, content := range map[string]string{"supervisor's log": string(log), "audit log": string(audit)} {
		for _, secret := range []string{adasPassword, head} {
			if strings.Contains(content, secret) {
				t.Errorf("a secret is in the %s", name)
			}
		}
	}
}
