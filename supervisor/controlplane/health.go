package controlplane

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/openatoll/atoll/supervisor/controlplane/dns"
)

// checkTimeout is for one check of one component.
const checkTimeout = 2 * time.Second

// componentNames in the order in which Health reports.
func (c Config) componentNames() []string {
	names := []string{"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "dns", "metrics-server", "csr-approver", "login"}
	if c.VCenter != nil {
		names = append(names, "vcenter")
	}
	return append(names, "namespaces")
}

// Health asks the running control plane for the state of every component,
// over a socket under cfg.RunDir: the caller may be in any network namespace.
// It always returns one entry a component; when no control plane answers, all
// are unhealthy and the messages say so.
func Health(ctx context.Context, cfg Config) []ComponentHealth {
	report, err := askHealth(ctx, cfg)
	if err == nil {
		return report
	}
	report = nil
	for _, name := range cfg.componentNames() {
		report = append(report, ComponentHealth{Name: name, Message: "no control plane answers on " + cfg.healthSocket() + ": " + err.Error()})
	}
	return report
}

func askHealth(ctx context.Context, cfg Config) (report []ComponentHealth, err error) {
	client := http.Client{
		Timeout: 3 * checkTimeout,
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", cfg.healthSocket())
		}},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://supervisor/health", nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	err = json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&report)
	return report, err
}

// A healthServer answers Health.
type healthServer struct {
	server *http.Server
	mux    *http.ServeMux
	http   *http.Client // for the components' own endpoints
}

func serveHealth(s *supervisor) (*healthServer, error) {
	client, err := componentClient(s.config)
	if err != nil {
		return nil, err
	}
	socket := s.config.healthSocket()
	// The data directory's lock says that nobody else serves on it.
	if err := os.Remove(socket); err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("health socket: %w", err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("health socket: %w", err)
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("health socket: %w", err)
	}
	mux := http.NewServeMux()
	h := &healthServer{server: &http.Server{Handler: mux, ReadHeaderTimeout: checkTimeout}, mux: mux, http: client}
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(s.report(r.Context())); err != nil {
			s.log.Debug("health not sent", "error", err)
		}
	})
	go h.server.Serve(l) //nolint:errcheck // ends with ErrServerClosed
	return h, nil
}

func (h *healthServer) close() { h.server.Close() }

// componentClient trusts the cluster's authority alone.
func componentClient(c Config) (*http.Client, error) {
	ca, err := os.ReadFile(c.ClientCAFile())
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	return &http.Client{Timeout: checkTimeout, Transport: &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12},
		DisableKeepAlives: true,
	}}, nil
}

// get fails unless url answers 200.
func (s *supervisor) get(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := s.health.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 512))
	return fmt.Errorf("%s answers %s: %s", url, resp.Status, firstFailed(string(body)))
}

// firstFailed picks the failed check out of a verbose health answer.
func firstFailed(body string) string {
	for line := range strings.Lines(body) {
		if strings.HasPrefix(line, "[-]") {
			return strings.TrimSpace(line)
		}
	}
	return strings.TrimSpace(body)
}

// report runs all checks side by side.
func (s *supervisor) report(ctx context.Context) []ComponentHealth {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	c := s.config
	checks := map[string]func() (string, error){
		"etcd":           func() (string, error) { return s.checkEtcd(ctx) },
		"kube-apiserver": func() (string, error) { return "ready", s.get(ctx, c.Server()+"/readyz") },
		"kube-controller-manager": func() (string, error) {
			return "healthy", s.get(ctx, fmt.Sprintf("https://127.0.0.1:%d/healthz", controllerManagerPort))
		},
		"kube-scheduler": func() (string, error) {
			return "healthy", s.get(ctx, fmt.Sprintf("https://127.0.0.1:%d/readyz", schedulerPort))
		},
		"dns":            func() (string, error) { return s.checkDNS(ctx) },
		"metrics-server": func() (string, error) { return s.checkMetrics(ctx) },
		"csr-approver":   s.checkApprover,
		"login":          func() (string, error) { return "serving", s.get(ctx, c.loginURL()+"/healthz") },
		"vcenter":        func() (string, error) { return s.checkVCenter(ctx) },
		"namespaces":     func() (string, error) { return s.checkNamespaces(ctx) },
	}
	names := c.componentNames()
	out := make([]ComponentHealth, len(names))
	var wg sync.WaitGroup
	for i, name := range names {
		wg.Go(func() {
			message, err := checks[name]()
			if err != nil {
				message = err.Error()
			}
			out[i] = ComponentHealth{Name: name, Healthy: err == nil, Message: message}
		})
	}
	wg.Wait()
	return out
}

func (s *supervisor) checkEtcd(ctx context.Context) (string, error) {
	cl, err := etcdClient(s.config)
	if err != nil {
		return "", err
	}
	defer cl.Close() //nolint:errcheck // nothing was written
	st, err := cl.Status(ctx, s.config.etcdEndpoint())
	if err != nil {
		return "", err
	}
	if len(st.Errors) > 0 {
		return "", fmt.Errorf("alarms: %s", strings.Join(st.Errors, "; "))
	}
	return fmt.Sprintf("revision %d, %d MiB of %d", st.Header.Revision, st.DbSize>>20, etcdQuota>>20), nil
}

func (s *supervisor) checkDNS(ctx context.Context) (string, error) {
	c := s.config
	name := "kubernetes.default.svc." + c.ClusterDomain
	addrs, err := dns.Lookup(ctx, netip.AddrPortFrom(c.Address, c.DNSPort), name)
	if err != nil {
		return "", err
	}
	if len(addrs) != 1 || addrs[0] != c.KubernetesServiceAddress() {
		return "", fmt.Errorf("%s is %v, want %s", name, addrs, c.KubernetesServiceAddress())
	}
	return "answers", nil
}

// checkMetrics: a cluster without a node, or a fresh one, has no metrics and
// is healthy all the same.
func (s *supervisor) checkMetrics(ctx context.Context) (string, error) {
	base := fmt.Sprintf("https://%s:%d", s.config.Address, s.config.MetricsPort)
	if err := s.get(ctx, base+"/livez"); err != nil {
		return "", err
	}
	if s.get(ctx, base+"/readyz") == nil {
		return "ready", nil
	}
	return "alive, no metrics of any node yet", nil
}

func (s *supervisor) checkApprover() (string, error) {
	if a := s.approver.Load(); a == nil || !a.Synced() {
		return "", fmt.Errorf("has not read the certificate requests yet")
	}
	return "watching", nil
}

// An access is a right that an identity needs before its component starts:
// the authorizer learns of new bindings a moment after they were made, and a
// client that was refused waits a second or more before it tries again.
type access struct{ identity, verb, group, resource, name string }

func (a access) check(ctx context.Context, c Config) error {
	cfg, err := restConfig(c, a.identity)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return err
	}
	namespace := ""
	if a.name != "" {
		namespace = metav1.NamespaceSystem
	}
	review, err := client.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, &authorizationv1.SelfSubjectAccessReview{
		Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authorizationv1.ResourceAttributes{
			Namespace: namespace, Verb: a.verb, Group: a.group, Resource: a.resource, Name: a.name,
		}},
	}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	if !review.Status.Allowed {
		return fmt.Errorf("%s may not %s %s yet", a.identity, a.verb, a.resource)
	}
	return nil
}
