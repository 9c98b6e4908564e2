// Package proxy runs upstream's kube-proxy in process: Services by nftables,
// on a node whose pods hang on routed taps.
//
// It puts the parts of k8s.io/kubernetes/pkg/proxy together itself, as
// cmd/kube-proxy/app does, because that program owns its process: it calls
// os.Exit when the node's address changes, deletes other proxies' iptables
// rules at its start, never returns when its context ends, and always runs for
// IPv6 as well.
package proxy

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-logr/logr"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/selection"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/events"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/proxy/apis"
	proxyconfigapi "k8s.io/kubernetes/pkg/proxy/apis/config"
	"k8s.io/kubernetes/pkg/proxy/config"
	"k8s.io/kubernetes/pkg/proxy/metrics"
	"k8s.io/kubernetes/pkg/proxy/nftables"
	proxyutil "k8s.io/kubernetes/pkg/proxy/util"
	"sigs.k8s.io/knftables"
)

// Config says for which node Services are made to work.
type Config struct {
	// Kubeconfig is the path of the credentials; unused when REST is set. They
	// must allow what ClusterRole system:node-proxier allows.
	Kubeconfig string
	// REST is the API server's address with credentials.
	REST *rest.Config
	// NodeName is the Node object's name.
	NodeName string
	// NodeIP is the node's IPv4 address. NodePorts are opened on it and on
	// NodePortAddresses, nowhere else.
	NodeIP            netip.Addr
	NodePortAddresses []netip.Prefix
	// ClusterCIDR is the range of all pods of all nodes: traffic from
	// elsewhere to a Service gets a node's address as its source.
	ClusterCIDR netip.Prefix
	// Logger defaults to slog.Default().
	Logger *slog.Logger
}

const (
	// resync is how often informers present everything again (kube-proxy's
	// default).
	resync = 15 * time.Minute
	// syncPeriod is how often rules are retried and connection tracking is
	// cleaned, minSync how closely two syncs may follow (kube-proxy's
	// defaults).
	syncPeriod = 30 * time.Second
	minSync    = time.Second
	// masqueradeBit of the packet mark; tap.MasqueradeMark is this bit.
	masqueradeBit = 14
)

// Run keeps the node's nftables table "ip kube-proxy" in line with Services
// and EndpointSlices until ctx ends, which is no error. It changes no sysctl.
// The table stays, as connections do: Cleanup removes it. Run once a process:
// upstream's sync loop cannot be stopped (it idles after the end of ctx), and
// its metrics are global (kubeproxy_*, in the legacy registry).
func Run(ctx context.Context, cfg Config) error {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if err := cfg.validate(); err != nil {
		return err
	}
	rc := cfg.REST
	if rc == nil {
		var err error
		if rc, err = clientcmd.BuildConfigFromFlags("", cfg.Kubeconfig); err != nil {
			return fmt.Errorf("service proxy: kubeconfig %s: %w", cfg.Kubeconfig, err)
		}
	}
	rc = rest.CopyConfig(rc)
	rc.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	rc.ContentType = runtime.ContentTypeProtobuf
	rc.UserAgent = "atoll-service-proxy"
	client, err := kubernetes.NewForConfig(rc)
	if err != nil {
		return fmt.Errorf("service proxy: %w", err)
	}
	return run(ctx, cfg, client)
}

func (c Config) validate() error {
	var problem string
	switch {
	case c.NodeName == "":
		problem = "NodeName is empty"
	case !c.NodeIP.Is4():
		problem = fmt.Sprintf("NodeIP %s is not IPv4", c.NodeIP)
	case !c.ClusterCIDR.IsValid() || !c.ClusterCIDR.Addr().Is4():
		problem = fmt.Sprintf("ClusterCIDR %s is not an IPv4 range", c.ClusterCIDR)
	default:
		return nil
	}
	return fmt.Errorf("service proxy: %s: %w", problem, errdefs.ErrInvalidArgument)
}

func run(ctx context.Context, cfg Config, client kubernetes.Interface) error {
	ctx = klog.NewContext(ctx, logr.FromSlogHandler(cfg.Logger.Handler()).WithName("kube-proxy"))
	metrics.RegisterMetrics(proxyconfigapi.ProxyModeNFTables)

	if err := ensureTable(ctx); err != nil {
		return fmt.Errorf("service proxy: nftables: %w", err)
	}
	broadcaster := events.NewBroadcaster(&events.EventSinkImpl{Interface: client.EventsV1()})
	defer broadcaster.Shutdown()
	if err := broadcaster.StartRecordingToSinkWithContext(ctx); err != nil {
		return fmt.Errorf("service proxy: events: %w", err)
	}
	nodePorts := []string{netip.PrefixFrom(cfg.NodeIP, 32).String()}
	for _, p := range cfg.NodePortAddresses {
		nodePorts = append(nodePorts, p.String())
	}
	proxier, err := nftables.NewProxier(ctx, v1.IPv4Protocol, syncPeriod, minSync, false, masqueradeBit,
		proxyutil.NewDetectLocalByCIDR(cfg.ClusterCIDR.Masked().String()), cfg.NodeName, cfg.NodeIP.AsSlice(),
		broadcaster.NewRecorder(scheme.Scheme, "kube-proxy"), nil, nodePorts, false)
	if err != nil {
		return fmt.Errorf("service proxy: nftables: %w", err)
	}
	if err := watch(ctx, cfg, client, proxier); err != nil {
		return fmt.Errorf("service proxy: %w", err)
	}
	cfg.Logger.InfoContext(ctx, "service proxy runs", "node", cfg.NodeName, "node_ip", cfg.NodeIP, "cluster_cidr", cfg.ClusterCIDR)
	go proxier.SyncLoop()
	<-ctx.Done()
	return nil
}

// ensureTable makes the table that the proxier will fill: where it is missing,
// the first sync would log an error about it.
func ensureTable(ctx context.Context) error {
	nft, err := newTable()
	if err != nil {
		return err
	}
	tx := nft.NewTransaction()
	tx.Add(&knftables.Table{})
	return nft.Run(ctx, tx)
}

func newTable() (knftables.Interface, error) {
	nft, err := knftables.New(knftables.IPv4Family, "kube-proxy")
	if err != nil {
		return nil, fmt.Errorf("%v: run as root, and `apt-get install nftables`: %w", err, errdefs.ErrFailedPrecondition)
	}
	return nft, nil
}

// watch connects the proxier with the API. Handlers are registered before
// their sources start, since these only tell of changes.
func watch(ctx context.Context, cfg Config, client kubernetes.Interface, proxier *nftables.Proxier) error {
	noProxyName, err := labels.NewRequirement(apis.LabelServiceProxyName, selection.DoesNotExist, nil)
	if err != nil {
		return err
	}
	noHeadless, err := labels.NewRequirement(v1.IsHeadlessService, selection.DoesNotExist, nil)
	if err != nil {
		return err
	}
	factory := func(tweak func(*metav1.ListOptions)) informers.SharedInformerFactory {
		return informers.NewSharedInformerFactoryWithOptions(client, resync,
			informers.WithTweakListOptions(tweak), informers.WithTransform(dropManagedFields))
	}
	services := factory(func(o *metav1.ListOptions) {
		o.LabelSelector = labels.NewSelector().Add(*noProxyName).String()
		o.FieldSelector = fields.OneTermNotEqualSelector("spec.clusterIP", v1.ClusterIPNone).String()
	})
	slices := factory(func(o *metav1.ListOptions) {
		o.LabelSelector = labels.NewSelector().Add(*noHeadless).String()
	})
	node := factory(func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector("metadata.name", cfg.NodeName).String()
	})
	all := factory(func(*metav1.ListOptions) {})

	serviceConfig := config.NewServiceConfig(ctx, services.Core().V1().Services(), resync)
	serviceConfig.RegisterEventHandler(proxier)
	sliceConfig := config.NewEndpointSliceConfig(ctx, slices.Discovery().V1().EndpointSlices(), resync)
	sliceConfig.RegisterEventHandler(proxier)
	cidrConfig := config.NewServiceCIDRConfig(ctx, all.Networking().V1().ServiceCIDRs(), resync)
	cidrConfig.RegisterEventHandler(proxier)
	nodeConfig := config.NewNodeTopologyConfig(ctx, node.Core().V1().Nodes(), resync)
	nodeConfig.RegisterEventHandler(proxier)
	go serviceConfig.Run(ctx.Done())
	go sliceConfig.Run(ctx.Done())
	go cidrConfig.Run(ctx.Done())
	for _, f := range []informers.SharedInformerFactory{services, slices, node, all} {
		f.Start(ctx.Done())
	}
	return nil
}

// dropManagedFields halves what the caches hold; nothing here reads them.
func dropManagedFields(obj any) (any, error) {
	if m, ok := obj.(metav1.Object); ok {
		m.SetManagedFields(nil)
	}
	return obj, nil
}

// Present tells whether the present network namespace has kube-proxy's nftables
// table, ours or another's.
func Present(ctx context.Context) (bool, error) {
	nft, err := newTable()
	if err != nil {
		return false, fmt.Errorf("service proxy: nftables: %w", err)
	}
	_, err = nft.List(ctx, "chains")
	if knftables.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("service proxy: nftables: %w", err)
	}
	return true, nil
}

// Cleanup removes kube-proxy's nftables table from the present network
// namespace. No proxy may run there any more. Repeating it succeeds.
func Cleanup(ctx context.Context) error {
	nft, err := newTable()
	if err == nil {
		tx := nft.NewTransaction()
		tx.Delete(&knftables.Table{})
		err = nft.Run(ctx, tx)
	}
	if err != nil && !knftables.IsNotFound(err) {
		return fmt.Errorf("service proxy: nftables: remove the table: %w", err)
	}
	return nil
}
