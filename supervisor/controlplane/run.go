package controlplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"go.etcd.io/etcd/server/v3/embed"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	logsapi "k8s.io/component-base/logs/api/v1"

	"github.com/openatoll/atoll/internal/gcpace"
	"github.com/openatoll/atoll/supervisor/controlplane/addons"
	"github.com/openatoll/atoll/supervisor/controlplane/approver"
	"github.com/openatoll/atoll/supervisor/controlplane/dns"
	"github.com/openatoll/atoll/supervisor/controlplane/metricsserver"
	"github.com/openatoll/atoll/supervisor/namespaces"
	"github.com/openatoll/atoll/supervisor/runtimeclass"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

const (
	// startTimeout is for a start on a very slow or busy machine; a usual one
	// takes three seconds.
	startTimeout = 3 * time.Minute
	// Each layer gets this long to stop before the next one is stopped all
	// the same: the process ends afterwards, and etcd's log makes a hard end
	// as safe as a soft one.
	clientsStopTimeout   = 2 * time.Second
	apiServerStopTimeout = 2 * time.Second
	// upkeepInterval is how often certificates and the bootstrap token are
	// looked at.
	upkeepInterval = time.Hour
)

// Run starts the control plane, reports each phase to progress (which must
// not block; nil is allowed), and blocks until ctx ends, when it stops
// everything in order and returns nil, or until a component fails, when it
// stops the others and returns an error that names the component and the log.
// A data directory of a newer version, one that another process runs on, and
// an Address that is on no link are ErrFailedPrecondition; a port in use is
// ErrUnavailable. All of these are found before anything is started.
func Run(ctx context.Context, c Config, progress func(Phase)) error {
	if err := c.Validate(); err != nil {
		return err
	}
	if err := checkAddress(c.Address); err != nil {
		return err
	}
	if err := CheckDataDir(c.DataDir); err != nil {
		return err
	}
	unlock, err := lockDataDir(c)
	if err != nil {
		return err
	}
	defer unlock()
	if errs := CheckPorts(c); len(errs) > 0 {
		return errors.Join(errs...)
	}
	if err := prepareDataDir(c); err != nil {
		return err
	}
	// The API server's caches make a heap whose garbage the default would let grow
	// to the same size again.
	go gcpace.Run(ctx, 50, 200)
	stampVersion()
	s := &supervisor{config: c, log: slog.Default().With("component", "controlplane"), failed: make(chan error, 16), progress: progress, last: time.Now()}
	err = s.run(ctx)
	if err != nil {
		return fmt.Errorf("control plane: %w (log: %s)", err, c.LogFile())
	}
	return nil
}

// A supervisor is one Run.
type supervisor struct {
	config   Config
	log      *slog.Logger
	progress func(Phase)
	last     time.Time // end of the last phase

	failed chan error // the first failures of components; never blocks

	etcd     *embed.Etcd
	clients  *group                              // what talks to the API server
	apis     *group                              // the API server, and the watch over etcd
	approver atomic.Pointer[approver.Controller] // read by the health server
	health   *healthServer

	namespaces atomic.Pointer[namespaces.Controller] // read by the health server

	vcenter     *vcsim.Server // nil: there is none
	mirrorPower mirrorPower
}

// A group is goroutines that stop together.
type group struct {
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func newGroup() *group {
	g := &group{}
	// Not a child of Run's context: groups are stopped in order.
	g.ctx, g.cancel = context.WithCancel(context.Background())
	return g
}

// stop returns whether all ended in time.
func (g *group) stop(timeout time.Duration) bool {
	g.cancel()
	done := make(chan struct{})
	go func() { g.wg.Wait(); close(done) }()
	select {
	case <-done:
		return true
	case <-time.After(timeout):
		return false
	}
}

// start runs one component; one that returns before its group is stopped has
// failed.
func (s *supervisor) start(g *group, name string, run func(context.Context) error) {
	g.wg.Go(func() {
		err := run(g.ctx)
		if g.ctx.Err() != nil {
			return
		}
		if err == nil {
			err = errors.New("ended without an error")
		}
		select {
		case s.failed <- fmt.Errorf("%s failed: %w", name, err):
		default:
		}
	})
}

func (s *supervisor) done(phase, detail string) {
	now := time.Now()
	p := Phase{Name: phase, Took: now.Sub(s.last), Detail: detail}
	s.last = now
	s.log.Info("phase done", "phase", p.Name, "took", p.Took, "detail", p.Detail)
	if s.progress != nil {
		s.progress(p)
	}
}

func (s *supervisor) run(ctx context.Context) error {
	defer s.stop()
	startCtx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	// A component that fails ends the start at once.
	startErr := make(chan error, 1)
	go func() { startErr <- s.startAll(startCtx) }()
	select {
	case err := <-s.failed:
		cancel()
		<-startErr
		return err
	case err := <-startErr:
		if err != nil {
			if ctx.Err() != nil {
				return nil // told to stop while starting
			}
			return err
		}
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-s.failed:
			return err
		case <-time.After(upkeepInterval):
			s.upkeep(ctx)
		}
	}
}

func (s *supervisor) startAll(ctx context.Context) error {
	c := s.config
	s.clients, s.apis = newGroup(), newGroup()
	renewed, err := ensureIdentities(c, time.Now())
	if err != nil {
		return fmt.Errorf("certificates: %w", err)
	}
	if err := writeAuditPolicy(c); err != nil {
		return err
	}
	s.done(PhasePKI, fmt.Sprintf("%d certificates issued", len(renewed)))

	if s.etcd, err = startEtcd(ctx, c); err != nil {
		return err
	}
	s.start(s.apis, "etcd", func(ctx context.Context) error { return waitEtcd(ctx, s.etcd) })
	s.done(PhaseEtcd, "on "+c.etcdSocket())
	if s.health, err = serveHealth(s); err != nil {
		return err
	}

	if err := s.startVCenter(); err != nil {
		return err
	}
	if err := s.startLogin(); err != nil {
		return err
	}

	// Upstream applies its logging options in every component; in one process
	// the later ones must find that it is done.
	logsapi.ReapplyHandling = logsapi.ReapplyHandlingIgnoreUnchanged
	s.start(s.apis, "kube-apiserver", func(ctx context.Context) error { return runAPIServer(ctx, c.apiServerArgs()) })
	admin, err := restConfig(c, superAdmin)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(admin)
	if err != nil {
		return err
	}
	if err := waitReadyz(ctx, client); err != nil {
		return err
	}
	s.done(PhaseAPIServer, c.Server())
	return s.startRest(ctx, admin, client)
}

// startRest starts what talks to the API server: all side by side, since each
// waits for the others' work, and reported in order.
func (s *supervisor) startRest(ctx context.Context, admin *rest.Config, client kubernetes.Interface) error {
	c := s.config
	s.start(s.clients, "kube-controller-manager", func(ctx context.Context) error {
		return runControllerManager(ctx, c.controllerManagerArgs())
	})
	s.start(s.clients, "kube-scheduler", func(ctx context.Context) error { return runScheduler(ctx, c.schedulerArgs()) })
	addonsDone := make(chan error, 1)
	go func() { addonsDone <- s.installAddons(ctx, admin, client) }()
	for _, component := range []struct {
		phase string
		port  int
	}{{PhaseControllerManager, controllerManagerPort}, {PhaseScheduler, schedulerPort}} {
		url := fmt.Sprintf("https://127.0.0.1:%d/healthz", component.port)
		if err := poll(ctx, component.phase, func() error { return s.get(ctx, url) }); err != nil {
			<-addonsDone
			return err
		}
		s.done(component.phase, fmt.Sprintf("healthy on 127.0.0.1:%d", component.port))
	}
	if err := <-addonsDone; err != nil {
		return err
	}
	s.done(PhaseAddons, "rights, Services and policies in place")
	if err := s.startAddons(ctx); err != nil {
		return err
	}
	if err := waitDefaultServiceAccount(ctx, client); err != nil {
		return err
	}
	if err := waitRuntimeClass(ctx, client); err != nil {
		return err
	}
	// What a start has allocated is mostly garbage by now.
	debug.FreeOSMemory()
	s.done(PhaseReady, "kubeconfig "+c.Kubeconfig())
	return nil
}

func (s *supervisor) installAddons(ctx context.Context, admin *rest.Config, client kubernetes.Interface) error {
	c := s.config
	values, err := c.addonValues()
	if err != nil {
		return err
	}
	objects, err := addons.Objects(values)
	if err != nil {
		return err
	}
	dyn, err := dynamic.NewForConfig(admin)
	if err != nil {
		return err
	}
	if err := addons.Apply(ctx, dyn, objects); err != nil {
		return err
	}
	if err := runtimeclass.Ensure(ctx, client); err != nil {
		return err
	}
	if err := ensureBootstrapToken(ctx, c, client, time.Now()); err != nil {
		return err
	}
	for _, need := range []access{
		{coreDNS, "list", "discovery.k8s.io", "endpointslices", ""},
		{metricsServer, "list", "", "nodes", ""},
		{metricsServer, "get", "", "configmaps", "extension-apiserver-authentication"},
		{csrApprover, "list", "certificates.k8s.io", "certificatesigningrequests", ""},
	} {
		if err := poll(ctx, "rights of "+need.identity, func() error { return need.check(ctx, c) }); err != nil {
			return err
		}
	}
	return nil
}

// startAddons starts what needs the rights that installAddons gave.
func (s *supervisor) startAddons(ctx context.Context) error {
	if err := s.startApprover(); err != nil {
		return err
	}
	if err := s.startCompliance(); err != nil {
		return err
	}
	if err := s.joinVCenter(ctx); err != nil {
		return err
	}
	if err := s.startNamespaces(); err != nil {
		return err
	}
	if err := s.startVolumes(); err != nil {
		return err
	}
	if err := s.startSnapshots(); err != nil {
		return err
	}
	if err := s.startVSphereFront(); err != nil {
		return err
	}
	metricsDone := make(chan error, 1)
	go func() { metricsDone <- s.startMetrics(ctx) }()
	c := s.config
	if err := s.startDNS(ctx); err != nil {
		<-metricsDone
		return err
	}
	s.done(PhaseDNS, fmt.Sprintf("%s on %s:%d", c.ClusterDomain, c.Address, c.DNSPort))
	if err := <-metricsDone; err != nil {
		return err
	}
	s.done(PhaseMetrics, fmt.Sprintf("on %s:%d, every %s", c.Address, c.MetricsPort, metricsserver.Resolution))
	return nil
}

func (s *supervisor) startApprover() error {
	cfg, err := restConfig(s.config, csrApprover)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return err
	}
	controller := approver.New(client, approver.Reserved{ClusterDomain: s.config.ClusterDomain, Services: s.config.ServiceCIDR}, s.log)
	s.approver.Store(controller)
	s.start(s.clients, "csr-approver", controller.Run)
	return nil
}

func (s *supervisor) startDNS(ctx context.Context) (err error) {
	c := s.config
	var upstreams []netip.AddrPort
	for _, u := range c.DNSUpstreams {
		a, err := parseUpstream(u)
		if err != nil {
			return err
		}
		upstreams = append(upstreams, a)
	}
	server, err := dns.Start(dns.Config{
		Listen:     netip.AddrPortFrom(c.Address, c.DNSPort),
		Ready:      netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), dnsReadyPort),
		Domain:     c.ClusterDomain,
		Kubeconfig: c.componentKubeconfig(coreDNS),
		Upstreams:  upstreams,
	})
	if err != nil {
		return err
	}
	s.start(s.clients, "dns", server.Run)
	return server.WaitReady(ctx)
}

func (s *supervisor) startMetrics(ctx context.Context) error {
	c := s.config
	server, err := metricsserver.New(metricsserver.Config{
		Listen:              netip.AddrPortFrom(c.Address, c.MetricsPort),
		CertFile:            c.pkiPath("metrics-server.crt"),
		KeyFile:             c.pkiPath("metrics-server.key"),
		Kubeconfig:          c.componentKubeconfig(metricsServer),
		ClientCAFile:        c.ClientCAFile(),
		RequestHeaderCAFile: c.pkiPath("front-proxy-ca.crt"),
		KubeletCAFile:       c.ClientCAFile(),
	})
	if err != nil {
		return err
	}
	s.start(s.clients, "metrics-server", server.Run)
	url := fmt.Sprintf("https://%s:%d/livez", c.Address, c.MetricsPort)
	return poll(ctx, "metrics-server", func() error { return s.get(ctx, url) })
}

// stop takes the layers down from the top; it may be called in any state.
func (s *supervisor) stop() {
	began := time.Now()
	if s.health != nil {
		s.health.close()
	}
	if s.clients != nil && !s.clients.stop(clientsStopTimeout) {
		s.log.Warn("controllers did not stop in time", "timeout", clientsStopTimeout)
	}
	if s.apis != nil && !s.apis.stop(apiServerStopTimeout) {
		s.log.Warn("the API server still had requests when its time was up", "timeout", apiServerStopTimeout)
	}
	if s.etcd != nil {
		stopEtcd(s.etcd)
	}
	if err := os.RemoveAll(s.config.socketDir()); err != nil {
		s.log.Warn("run directory not emptied", "error", err)
	}
	s.log.Info("control plane stopped", "took", time.Since(began))
}

// upkeep renews what is near its end. The components read the files again;
// a failure is logged and tried again after upkeepInterval.
func (s *supervisor) upkeep(ctx context.Context) {
	renewed, err := ensureIdentities(s.config, time.Now())
	if err != nil {
		s.log.Error("certificates not renewed", "error", err)
	} else if len(renewed) > 0 {
		s.log.Info("certificates renewed", "files", renewed)
	}
	if err := s.renewVCenter(renewed); err != nil {
		s.log.Error("certificate of the embedded vCenter not renewed", "error", err)
	}
	cfg, err := restConfig(s.config, superAdmin)
	if err == nil {
		var client *kubernetes.Clientset
		if client, err = kubernetes.NewForConfig(cfg); err == nil {
			err = ensureBootstrapToken(ctx, s.config, client, time.Now())
		}
	}
	if err != nil {
		s.log.Error("bootstrap token not renewed", "error", err)
	}
}

func restConfig(c Config, identity string) (*rest.Config, error) {
	cfg, err := clientcmd.BuildConfigFromFlags("", c.componentKubeconfig(identity))
	if err != nil {
		return nil, err
	}
	cfg.QPS = -1 // the API server's own fairness is enough
	cfg.UserAgent = "atoll/" + identity
	return cfg, nil
}

// clients are those of one of the supervisor's own identities.
func clients(c Config, identity string) (kubernetes.Interface, dynamic.Interface, error) {
	cfg, err := restConfig(c, identity)
	if err != nil {
		return nil, nil, err
	}
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, nil, err
	}
	dyn, err := dynamic.NewForConfig(cfg)
	return client, dyn, err
}

// checkAddress says before anything starts what would come as "cannot assign
// requested address" from three components.
func checkAddress(a netip.Addr) error {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return fmt.Errorf("control plane: list addresses: %w", err)
	}
	for _, have := range addrs {
		if p, err := netip.ParsePrefix(have.String()); err == nil && p.Addr().Unmap() == a {
			return nil
		}
	}
	return fmt.Errorf("control plane: address %s is on no link of this network namespace: put it on one first: %w", a, errdefs.ErrFailedPrecondition)
}

// poll calls f every 25 ms until it succeeds or ctx ends.
func poll(ctx context.Context, what string, f func() error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w", what, err)
		case <-time.After(25 * time.Millisecond):
		}
	}
}

func waitReadyz(ctx context.Context, client kubernetes.Interface) error {
	return poll(ctx, "kube-apiserver", func() error {
		return client.Discovery().RESTClient().Get().AbsPath("/readyz").Timeout(2 * time.Second).Do(ctx).Error()
	})
}

// waitDefaultServiceAccount: without it every pod is refused.
func waitDefaultServiceAccount(ctx context.Context, client kubernetes.Interface) error {
	return poll(ctx, "ServiceAccount default/default", func() error {
		_, err := client.CoreV1().ServiceAccounts(metav1.NamespaceDefault).Get(ctx, "default", metav1.GetOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("kube-apiserver: %w", err)
		}
		return err
	})
}

// waitRuntimeClass tries a pod out until it gets the class and its overhead: the
// API server takes up to a second to act by a new policy.
func waitRuntimeClass(ctx context.Context, client kubernetes.Interface) error {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "atoll-tries-", Namespace: metav1.NamespaceDefault},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "none"}}},
	}
	return poll(ctx, "RuntimeClass "+runtimeclass.Name+" of pods that name none", func() error {
		made, err := client.CoreV1().Pods(pod.Namespace).Create(ctx, pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if apierrors.IsForbidden(err) || apierrors.IsInvalid(err) {
			return nil // a policy of the cluster's own refuses such pods
		}
		if err != nil {
			return fmt.Errorf("kube-apiserver: %w", err)
		}
		if made.Spec.RuntimeClassName == nil || len(made.Spec.Overhead) == 0 {
			return errors.New("pods do not get it yet")
		}
		return nil
	})
}
