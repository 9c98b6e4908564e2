package controlplane

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	authenticationv1 "k8s.io/api/authentication/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/openatoll/atoll/supervisor/controlplane/dns"
)

// TestControlPlane is one life of a cluster, since every start costs seconds:
// fresh start, use, backup, stop, loss, restore, kill -9, restart.
func TestControlPlane(t *testing.T) {
	if testing.Short() {
		t.Skip("starts control planes; about 30 s")
	}
	cfg := testConfig(t)
	ctx := t.Context()

	s := startServer(t, cfg)
	t.Logf("fresh start %.2f s, RSS %d MiB, phases %v", s.started.Seconds(), s.rss(t), s.phases)
	if got, want := phaseNames(s), []string{PhasePKI, PhaseEtcd, PhaseAPIServer, PhaseControllerManager, PhaseScheduler, PhaseAddons, PhaseDNS, PhaseMetrics, PhaseReady}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("phases %v, want %v", got, want)
	}
	admin := clientFrom(t, restFrom(t, cfg.Kubeconfig()))

	t.Run("health", func(t *testing.T) { checkHealth(t, cfg) })
	t.Run("private files", func(t *testing.T) { checkModes(t, cfg) })
	t.Run("one at a time", func(t *testing.T) { checkOccupied(t, cfg) })
	t.Run("version", func(t *testing.T) {
		v, err := admin.Discovery().ServerVersion()
		if err != nil || v.GitVersion != KubernetesVersion {
			t.Fatalf("version %v (err %v), want %s", v, err, KubernetesVersion)
		}
	})
	t.Run("dns", func(t *testing.T) { checkNamesAnswer(t, cfg) })
	t.Run("metrics API", func(t *testing.T) { checkMetricsAPI(t, admin) })
	t.Run("join", func(t *testing.T) { joinNode(t, cfg, admin) })
	t.Run("host access", func(t *testing.T) { checkHostAccess(t, admin) })

	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s"}, StringData: map[string]string{"k": "plain-text-marker"}}
	if _, err := admin.CoreV1().Secrets("default").Create(ctx, secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Run("secrets at rest", func(t *testing.T) { checkEncrypted(t, cfg) })
	token := newServiceAccountToken(t, admin)

	file := cfg.DataDir + ".backup"
	t.Cleanup(func() { os.Remove(file) })
	h, err := Backup(ctx, cfg, file)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("backup has mode %v (err %v), want 0600", st.Mode(), err)
	}
	if _, err := Backup(ctx, cfg, file); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second backup into the same file: %v", err)
	}
	late := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "late"}}
	if _, err := admin.CoreV1().ConfigMaps("default").Create(ctx, late, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := Restore(ctx, cfg, file); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "in use by process") {
		t.Errorf("restore into a running control plane: %v", err)
	}

	// Open requests must not hold up a stop.
	watch, err := admin.CoreV1().Pods("").Watch(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Stop()
	took := s.stop(t)
	t.Logf("stop %.2f s, backup of %d files at revision %d", took.Seconds(), len(h.Files), h.Revision)
	if took > 5*time.Second {
		t.Errorf("stop took %s, want at most 5 s", took)
	}
	for _, c := range Health(ctx, cfg) {
		if c.Healthy {
			t.Errorf("%s is healthy after the end", c.Name)
		}
	}

	t.Run("restore refuses", func(t *testing.T) { checkRestoreRefuses(t, cfg, file) })
	if err := os.RemoveAll(cfg.DataDir); err != nil {
		t.Fatal(err)
	}
	asFormat(t, file, 1) // without an embedded vCenter it is as it always was
	if _, err := Restore(ctx, cfg, file); err != nil {
		t.Fatal(err)
	}
	s = startServer(t, cfg)
	t.Logf("start after restore %.2f s", s.started.Seconds())
	admin = clientFrom(t, restFrom(t, cfg.Kubeconfig()))
	checkRestored(t, admin, token)

	if _, err := admin.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "before-kill"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	s.kill(t)
	s = startServer(t, cfg)
	t.Logf("start after kill -9 %.2f s, RSS %d MiB", s.started.Seconds(), s.rss(t))
	if _, err := admin.CoreV1().ConfigMaps("default").Get(ctx, "before-kill", metav1.GetOptions{}); err != nil {
		t.Errorf("after kill -9: %v", err)
	}
	t.Run("health after kill", func(t *testing.T) { checkHealth(t, cfg) })
	s.stop(t)
	if left, err := os.ReadDir(cfg.RunDir); err != nil || len(left) > 0 {
		t.Errorf("left in the run directory: %v (err %v)", left, err)
	}
}

func phaseNames(s *server) (names []string) {
	for _, p := range s.phases {
		names = append(names, p.Name)
	}
	return names
}

func checkHealth(t *testing.T, cfg Config) {
	report := Health(t.Context(), cfg)
	names := cfg.componentNames()
	if len(report) != len(names) {
		t.Fatalf("%d components, want %d", len(report), len(names))
	}
	for _, c := range report {
		if !c.Healthy {
			t.Errorf("%s: %s", c.Name, c.Message)
		}
	}
}

func checkModes(t *testing.T, cfg Config) {
	for _, f := range []string{cfg.Kubeconfig(), cfg.BootstrapKubeconfig(), cfg.encryptionFile(), cfg.pkiPath("ca.key"), cfg.pkiPath("sa.key"), cfg.componentKubeconfig(superAdmin), cfg.etcdSocket(), cfg.healthSocket()} {
		if st, err := os.Stat(f); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, err %v", f, st.Mode(), err)
		}
	}
}

func checkOccupied(t *testing.T, cfg Config) {
	if err := Run(t.Context(), cfg, nil); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "in use by process") {
		t.Errorf("second Run on the same data: %v", err)
	}
	errs := CheckPorts(cfg)
	if len(errs) != len(cfg.ports()) {
		t.Errorf("%d ports reported in use, want %d: %v", len(errs), len(cfg.ports()), errs)
	}
	for _, err := range errs {
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "process ") || !strings.Contains(err.Error(), "stop that process") {
			t.Errorf("port error without holder or cure: %v", err)
		}
	}
	other := cfg
	other.Address = netip.MustParseAddr("198.18.0.77")
	if err := Run(t.Context(), other, nil); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "198.18.0.77") {
		t.Errorf("address on no link: %v", err)
	}
}

func checkNamesAnswer(t *testing.T, cfg Config) {
	at := netip.AddrPortFrom(cfg.Address, cfg.DNSPort)
	for name, want := range map[string]netip.Addr{
		"kubernetes.default.svc.cluster.local":   cfg.KubernetesServiceAddress(),
		"kube-dns.kube-system.svc.cluster.local": cfg.DNSAddress,
	} {
		got, err := dns.Lookup(t.Context(), at, name)
		if err != nil || len(got) != 1 || got[0] != want {
			t.Errorf("%s is %v (err %v), want %s", name, got, err, want)
		}
	}
	for _, name := range []string{"example.com", "nope.default.svc.cluster.local"} {
		began := time.Now()
		_, err := dns.Lookup(t.Context(), at, name)
		var dnsErr *net.DNSError
		if !errors.As(err, &dnsErr) || !dnsErr.IsNotFound || time.Since(began) > time.Second {
			t.Errorf("%s: %v after %s, want not found at once", name, err, time.Since(began))
		}
	}
}

func checkMetricsAPI(t *testing.T, admin kubernetes.Interface) {
	eventually(t, "APIService v1beta1.metrics.k8s.io", func() error {
		b, err := admin.Discovery().RESTClient().Get().AbsPath("/apis/metrics.k8s.io/v1beta1/nodes").DoRaw(t.Context())
		if err == nil && !bytes.Contains(b, []byte("NodeMetricsList")) {
			err = fmt.Errorf("answer %s", b)
		}
		return err
	})
}

// request makes a certificate request in PEM.
func request(t *testing.T, subject pkix.Name, names []string, ips []net.IP) (csr []byte, key *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: subject, DNSNames: names, IPAddresses: ips}, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), key
}

// submit creates a CSR and waits for its certificate or denial.
func submit(t *testing.T, client kubernetes.Interface, signer string, csr []byte, usages ...certificatesv1.KeyUsage) *certificatesv1.CertificateSigningRequest {
	t.Helper()
	o, err := client.CertificatesV1().CertificateSigningRequests().Create(t.Context(), &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "csr-"},
		Spec:       certificatesv1.CertificateSigningRequestSpec{Request: csr, SignerName: signer, Usages: usages},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "CSR for "+signer, func() error {
		if o, err = client.CertificatesV1().CertificateSigningRequests().Get(t.Context(), o.Name, metav1.GetOptions{}); err != nil {
			return err
		}
		for _, c := range o.Status.Conditions {
			if c.Type == certificatesv1.CertificateDenied {
				return nil
			}
		}
		if len(o.Status.Certificate) == 0 {
			return fmt.Errorf("no certificate yet, conditions %v", o.Status.Conditions)
		}
		return nil
	})
	return o
}

// joinNode does what a kubelet does: bootstrap token, client certificate,
// Node, serving certificate; and what a wicked one would try.
func joinNode(t *testing.T, cfg Config, admin kubernetes.Interface) {
	ctx := t.Context()
	subject := pkix.Name{CommonName: "system:node:n1", Organization: []string{"system:nodes"}}
	joiner := clientFrom(t, restFrom(t, cfg.BootstrapKubeconfig()))
	csr, key := request(t, subject, nil, nil)
	got := submit(t, joiner, certificatesv1.KubeAPIServerClientKubeletSignerName, csr, certificatesv1.UsageDigitalSignature, certificatesv1.UsageClientAuth)
	if len(got.Status.Certificate) == 0 {
		t.Fatalf("client certificate refused: %v", got.Status.Conditions)
	}
	if _, err := joiner.CoreV1().Secrets("kube-system").List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("a bootstrap token lists Secrets: %v", err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	nodeCfg := rest.AnonymousClientConfig(restFrom(t, cfg.BootstrapKubeconfig()))
	nodeCfg.CertData = got.Status.Certificate
	nodeCfg.KeyData = pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
	node := clientFrom(t, nodeCfg)

	n, err := node.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	status := []byte(`{"status":{"addresses":[{"type":"InternalIP","address":"198.18.0.1"},{"type":"Hostname","address":"n1"}]}}`)
	if _, err := node.CoreV1().Nodes().PatchStatus(ctx, n.Name, status); err != nil {
		t.Fatal(err)
	}
	eventually(t, "pod CIDR", func() error {
		n, err := node.CoreV1().Nodes().Get(ctx, "n1", metav1.GetOptions{})
		if err == nil && n.Spec.PodCIDR != "198.19.0.0/24" {
			err = fmt.Errorf("pod CIDR %q", n.Spec.PodCIDR)
		}
		return err
	})

	serving := []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageServerAuth}
	csr, _ = request(t, subject, []string{"n1"}, []net.IP{net.ParseIP("198.18.0.1")})
	if got := submit(t, node, certificatesv1.KubeletServingSignerName, csr, serving...); len(got.Status.Certificate) == 0 {
		t.Errorf("serving certificate refused: %v", got.Status.Conditions)
	}
	// The API server itself refuses another node's name; the rest is ours.
	csr, _ = request(t, subject, []string{"n1"}, nil)
	if got := submit(t, node, certificatesv1.KubeletServingSignerName, csr, append(serving, certificatesv1.UsageClientAuth)...); len(got.Status.Certificate) > 0 || !strings.Contains(got.Status.Conditions[0].Message, "client auth") {
		t.Errorf("a serving certificate that is a client's too: %v", got.Status.Conditions)
	}

	// What kube-proxy needs with the node's certificate, and no more.
	if _, err := node.DiscoveryV1().EndpointSlices("").List(ctx, metav1.ListOptions{}); err != nil {
		t.Errorf("a node cannot list EndpointSlices: %v", err)
	}
	if _, err := node.NetworkingV1().ServiceCIDRs().List(ctx, metav1.ListOptions{}); err != nil {
		t.Errorf("a node cannot list ServiceCIDRs: %v", err)
	}
	if _, err := node.CoreV1().Services("").List(ctx, metav1.ListOptions{}); err != nil {
		t.Errorf("a node cannot list Services: %v", err)
	}
	if _, err := node.CoreV1().Nodes().List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=n1"}); err != nil {
		t.Errorf("a node cannot list itself: %v", err)
	}
	if _, err := node.CoreV1().Nodes().List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("a node lists all nodes: %v", err)
	}
	if _, err := node.CoreV1().Secrets("kube-system").List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("a node lists Secrets: %v", err)
	}
	if err := admin.CoreV1().Nodes().Delete(ctx, "n1", metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}
}

func checkHostAccess(t *testing.T, admin kubernetes.Interface) {
	pod := func(change func(*corev1.PodSpec)) error {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: "p-"}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "atoll.local/busybox"}}}}
		change(&p.Spec)
		_, err := admin.CoreV1().Pods("default").Create(t.Context(), p, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	// The policy takes a moment to be compiled after a fresh start.
	eventually(t, "hostNetwork refused", func() error {
		if err := pod(func(s *corev1.PodSpec) { s.HostNetwork = true }); err == nil || !strings.Contains(err.Error(), "spec.hostNetwork: this pod runs in a virtual machine") {
			return fmt.Errorf("answer %v", err)
		}
		return nil
	})
	for want, change := range map[string]func(*corev1.PodSpec){
		"spec.hostPID:": func(s *corev1.PodSpec) { s.HostPID = true },
		"spec.hostIPC:": func(s *corev1.PodSpec) { s.HostIPC = true },
		"spec.volumes[v].hostPath:": func(s *corev1.PodSpec) {
			s.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/"}}}}
		},
	} {
		if err := pod(change); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "use ") && !strings.Contains(err.Error(), "leave the field out") {
			t.Errorf("%s: %v", want, err)
		}
	}
	if err := pod(func(s *corev1.PodSpec) {
		s.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
	}); err != nil {
		t.Errorf("a plain pod: %v", err)
	}
}

func checkEncrypted(t *testing.T, cfg Config) {
	cl, err := etcdClient(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	got, err := cl.Get(t.Context(), "/registry/secrets/default/s")
	if err != nil || len(got.Kvs) != 1 {
		t.Fatalf("Secret in etcd: %v, err %v", got, err)
	}
	if v := got.Kvs[0].Value; !bytes.HasPrefix(v, []byte("k8s:enc:secretbox:v1:key1:")) || bytes.Contains(v, []byte("plain-text-marker")) {
		t.Errorf("Secret is not encrypted at rest: %.40q", v)
	}
}

func newServiceAccountToken(t *testing.T, admin kubernetes.Interface) string {
	hour := int64(3600)
	tr, err := admin.CoreV1().ServiceAccounts("default").CreateToken(t.Context(), "default", &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &hour}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return tr.Status.Token
}

func checkRestored(t *testing.T, admin kubernetes.Interface, token string) {
	t.Helper()
	ctx := context.Background()
	s, err := admin.CoreV1().Secrets("default").Get(ctx, "s", metav1.GetOptions{})
	if err != nil || string(s.Data["k"]) != "plain-text-marker" {
		t.Errorf("Secret after restore: %v, err %v", s, err)
	}
	if _, err := admin.CoreV1().ConfigMaps("default").Get(ctx, "late", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("an object made after the backup: %v", err)
	}
	tr, err := admin.AuthenticationV1().TokenReviews().Create(ctx, &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token}}, metav1.CreateOptions{})
	if err != nil || !tr.Status.Authenticated {
		t.Errorf("a token from before the restore: %+v, err %v", tr.Status, err)
	}
}

func checkRestoreRefuses(t *testing.T, cfg Config, file string) {
	if _, err := Restore(t.Context(), cfg, file); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "--purge") {
		t.Errorf("restore over data: %v", err)
	}
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		content []byte
		is      func(error) bool
	}{
		"cut":       {good[:len(good)*2/3], errdefs.IsDataLoss},
		"flipped":   {flip(good, len(good)/2), errdefs.IsDataLoss},
		"no backup": {[]byte("hello"), errdefs.IsInvalidArgument},
		"newer":     {bytes.Replace(good, []byte(`"dataVersion": 1`), []byte(`"dataVersion": 9`), 1), errdefs.IsFailedPrecondition},
		"newer k8s": {bytes.ReplaceAll(good, []byte(`"kubernetesVersion": "v1.36`), []byte(`"kubernetesVersion": "v1.99`)), errdefs.IsFailedPrecondition},
	} {
		empty := testConfig(t)
		bad := empty.DataDir + ".bad"
		if err := os.WriteFile(bad, tc.content, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Restore(t.Context(), empty, bad); err == nil || !tc.is(err) {
			t.Errorf("%s: %v", name, err)
		}
		if hasData(empty) {
			t.Errorf("%s: data was left behind", name)
		}
		os.Remove(bad)
	}
}

func flip(b []byte, at int) []byte {
	b = bytes.Clone(b)
	b[at] ^= 1
	return b
}
