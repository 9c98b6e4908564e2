package spherelet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/coreos/go-systemd/v22/daemon"
	dto "github.com/prometheus/client_model/go"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/types"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/tools/record"
	"k8s.io/component-base/metrics/legacyregistry"
	kapp "k8s.io/kubernetes/cmd/kubelet/app"
	"k8s.io/kubernetes/cmd/kubelet/app/options"
	"k8s.io/kubernetes/pkg/kubelet"
	"k8s.io/kubernetes/pkg/kubelet/certificate/bootstrap"
	"k8s.io/kubernetes/pkg/kubelet/metrics"

	"github.com/openatoll/atoll/internal/version"
	"github.com/openatoll/atoll/spherelet/admission"
	"github.com/openatoll/atoll/spherelet/config"
	"github.com/openatoll/atoll/spherelet/machine"
	"github.com/openatoll/atoll/spherelet/resources"
	"github.com/openatoll/atoll/spherelet/volumes"
	"github.com/openatoll/atoll/vmpod"
)

// A node is one running spherelet.
type node struct {
	o       Options
	host    *machine.Host
	server  *options.KubeletServer
	kubelet atomic.Pointer[kubelet.Kubelet]
	deps    *kubelet.Dependencies
	preps   *preparations
}

// Run runs the node until ctx ends. The runtime must answer on
// Options.Paths.CRISocket. Pods are left running. It may be called once a
// process: upstream's feature gates and metrics are global.
func Run(ctx context.Context, o Options) error {
	if err := o.complete(); err != nil {
		return err
	}
	setupLogging(o.Logger, o.Config.KubeletVerbosity)
	registerMetrics(o.Facts, version.Version)
	n := &node{o: o, host: machine.New(o.Paths.Kubelet, o.Paths.Images, o.Paths.Cgroup)}
	n.preps = newPreparations(o.Preparer, n.activePods, o.Logger)
	if err := n.assemble(ctx); err != nil {
		return err
	}
	if err := portFree(n.server.Address, n.server.Port); err != nil {
		return err
	}
	stopHealth, err := n.serveHealth()
	if err != nil {
		return err
	}
	defer stopHealth()
	if err := n.join(ctx); err != nil {
		return err
	}
	if o.Subscribe != nil {
		o.Subscribe(n.podChanged)
	}
	if n.o.CSISocket != "" {
		stop, err := registerDriver(n.o.Paths.Kubelet, n.o.CSISocket, n.o.Logger)
		if err != nil {
			return err
		}
		defer stop()
	}
	go n.preps.run(ctx)
	// Upstream tells systemd READY=1 and feeds its watchdog.
	err = kapp.Run(ctx, n.server, n.deps, utilfeature.DefaultFeatureGate)
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("node %s: %w", o.Config.NodeName, err)
	}
	return nil
}

// assemble makes upstream's settings and dependencies and puts our parts in.
func (n *node) assemble(ctx context.Context) error {
	memory, err := n.host.Memory()
	if err != nil {
		return fmt.Errorf("memory of the host: %w", err)
	}
	for _, dir := range []string{n.o.Paths.Images, n.o.Paths.PodManifests} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	if n.server, err = kubeletServer(n.o.Config, n.o.Paths, n.o.Facts.labels(), memory); err != nil {
		return err
	}
	if err := utilfeature.DefaultMutableFeatureGate.SetFromMap(n.server.FeatureGates); err != nil {
		return err
	}
	if err := options.ValidateKubeletServer(n.server); err != nil {
		return fmt.Errorf("configuration of the kubelet: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	reserved, err := allocatable(&n.server.KubeletConfiguration)
	if err != nil {
		return fmt.Errorf("%v: %w", err, errdefs.ErrInvalidArgument)
	}
	if n.deps, err = kapp.UnsecuredDependencies(ctx, n.server, utilfeature.DefaultFeatureGate); err != nil {
		return err
	}
	admit, err := n.admitHandler(memory)
	if err != nil {
		return err
	}
	n.deps.CAdvisorInterface = patientHost{n.host}
	manager := newContainerManager(n.host, nodeConfig(n.o.Config.NodeName, n.o.Paths.Kubelet, reserved), admit, n.o.Paths.Kubelet)
	manager.pods.resizing = admit.resizing
	manager.pods.starting = func(pod *v1.Pod) {
		if k := n.kubelet.Load(); k != nil {
			awaitVolumes(k, pod)
		}
	}
	n.deps.ContainerManager = manager
	n.deps.VolumePlugins = volumes.Plugins(n.o.VolumeUsage, config.HostDirectories(n.o.Config))
	if n.o.CSISocket != "" {
		n.deps.VolumePlugins = append(n.deps.VolumePlugins, volumes.NewCSI())
	}
	n.deps.DynamicPluginProber = nil // FlexVolumes would mount on the host
	n.deps.Subpather = volumes.NewSubpather(ctx, n.o.SubPaths, n.server.RuntimeRequestTimeout.Duration, n.newSubPathTeller())
	n.deps.OSInterface = hostOS{}
	n.deps.Options = append(n.deps.Options, n.captured(ctx))
	return nil
}

func (n *node) admitHandler(memory int64) (*admitHandler, error) {
	ephemeral, err := resource.ParseQuantity(n.o.Config.Hypervisor.EphemeralDefault)
	if err != nil {
		return nil, fmt.Errorf("hypervisor.ephemeralDefault: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	fs, err := n.host.ImagesFsInfo(context.Background())
	if err != nil {
		return nil, err
	}
	return &admitHandler{
		host: admission.Host{CPUs: n.host.CPUs(), Memory: memory, Disk: int64(fs.Capacity), ImageDisks: n.o.ImageDisks,
			UserNamespaces: true, ImageVolumes: true, PersistentVolumes: n.o.CSISocket != "", HostDirectories: config.HostDirectories(n.o.Config)},
		policy:   resources.Policy{HostCPUs: n.host.CPUs(), HostMemory: memory, EphemeralDefault: ephemeral.Value()},
		extended: n.offers,
		preps:    n.preps,
		events:   n.events,
		log:      n.o.Logger,
	}, nil
}

// patientHost makes the kubelet wait for its first list of pods before it
// first reports the Node: Start is called in between. A restart would flip
// the Node to NotReady for ten seconds otherwise, "PLEG is not healthy".
type patientHost struct{ *machine.Host }

const firstListTimeout = 3 * time.Second

func (h patientHost) Start() error {
	for end := time.Now().Add(firstListTimeout); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		var m dto.Metric
		if err := metrics.PLEGLastSeen.Write(&m); err == nil && m.GetGauge().GetValue() > 0 {
			break
		}
	}
	return h.Host.Start()
}

// captured is called by upstream while it assembles the kubelet, the only
// place where the kubelet itself can be had. Clients and recorder exist then.
func (n *node) captured(ctx context.Context) kubelet.Option {
	return func(k *kubelet.Kubelet) {
		n.kubelet.Store(k)
		facts := &nodeFacts{facts: n.o.Facts, nodeName: n.o.Config.NodeName, client: n.deps.HeartbeatClient,
			recorder: n.deps.Recorder, node: k.GetNode, log: n.o.Logger}
		go facts.run(ctx)
		if n.o.Faults != nil {
			teller := &faultTeller{client: n.deps.KubeClient, recorder: n.deps.Recorder, log: n.o.Logger}
			n.o.Faults(func(f vmpod.Fault) { teller.tell(ctx, f) })
		}
		if n.o.Notices != nil {
			n.o.Notices(func(notice vmpod.Notice) { tellNotice(n.deps.Recorder, notice) })
		}
		if n.o.Starts != nil {
			teller := &startTeller{client: n.deps.KubeClient, recorder: n.deps.Recorder, accelerator: n.o.Facts.Accelerator, log: n.o.Logger}
			n.o.Starts(func(s vmpod.Start) { teller.tell(ctx, s) })
		}
		if n.o.PodVMs != nil && n.deps.KubeClient != nil {
			teller := newPodVMTeller(n.deps.KubeClient, func(namespace, name string) *v1.Pod {
				pod, _ := k.GetPodByName(namespace, name)
				return pod
			}, n.o.Logger)
			go teller.run(ctx)
			n.o.PodVMs(teller.tell)
		}
	}
}

// podChanged has the kubelet look at the pod now. Its generic PLEG stays the
// one source of truth; upstream's evented one hangs pods with init containers.
func (n *node) podChanged(podUID string) {
	n.preps.used(podUID)
	if k := n.kubelet.Load(); k != nil {
		k.RequestPodRelist(types.UID(podUID))
	}
}

func (n *node) activePods() map[string]bool {
	k := n.kubelet.Load()
	if k == nil {
		return nil
	}
	uids := map[string]bool{}
	for _, p := range k.GetActivePods() {
		uids[string(p.UID)] = true
	}
	return uids
}

// offers reports whether the Node's status has an extended resource.
func (n *node) offers(name string) bool {
	k := n.kubelet.Load()
	if k == nil {
		return false
	}
	node, err := k.GetNode(context.Background())
	if err != nil {
		return false
	}
	_, ok := node.Status.Allocatable[v1.ResourceName(name)]
	return ok
}

func (n *node) events() record.EventRecorder {
	if n.kubelet.Load() == nil {
		return nil
	}
	return n.deps.Recorder
}

// join gets the node's own credentials, if it has none yet: upstream would
// start with none and fail every call until they come.
func (n *node) join(ctx context.Context) error {
	c := n.o.Config
	if c.BootstrapKubeconfig == "" {
		if _, err := os.Stat(c.Kubeconfig); err != nil {
			return fmt.Errorf("kubeconfig %s is not there and bootstrapKubeconfig is not set: set bootstrapKubeconfig to the file that `atoll up` wrote for joining nodes: %w", c.Kubeconfig, errdefs.ErrNotFound)
		}
		return nil
	}
	err := bootstrap.LoadClientCert(ctx, c.Kubeconfig, c.BootstrapKubeconfig, n.o.Paths.PKI, types.NodeName(c.NodeName))
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("node %s cannot join: %w; is the API server named in %s reachable, and its token still valid?", c.NodeName, err, c.BootstrapKubeconfig)
	}
	return err
}

// portFree: upstream exits without a cure when it cannot listen.
func portFree(address string, port int32) error {
	l, err := net.Listen("tcp", net.JoinHostPort(address, strconv.Itoa(int(port))))
	if err != nil {
		return fmt.Errorf("port %d of the node: %w: stop what uses the port, or set another port; nodeIP must be an address of this host", port, err)
	}
	return l.Close()
}

// serveHealth serves /healthz and /metrics on loopback.
func (n *node) serveHealth() (stop func(), err error) {
	if n.o.Config.HealthPort < 0 {
		return func() {}, nil
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", n.healthz)
	mux.Handle("GET /metrics", legacyregistry.Handler())
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(n.o.Config.HealthPort))))
	if err != nil {
		return nil, fmt.Errorf("healthPort %d: %w: stop what uses the port, or set another healthPort (-1 for none)", n.o.Config.HealthPort, err)
	}
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	go func() {
		if err := srv.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
			n.o.Logger.Error("health endpoint ended", "err", err)
		}
	}()
	return func() { _ = srv.Close() }, nil
}

// healthz is the kubelet's own sync loop, as its /healthz on the node's port.
func (n *node) healthz(w http.ResponseWriter, r *http.Request) {
	k := n.kubelet.Load()
	if k == nil {
		http.Error(w, "the kubelet is not running yet", http.StatusServiceUnavailable)
		return
	}
	if err := k.SyncLoopHealthCheck(r); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	fmt.Fprintln(w, "ok")
}
