package spherelet

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	tracingapi "k8s.io/component-base/tracing/api/v1"
	"k8s.io/kubernetes/cmd/kubelet/app/options"
	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/apis/config"
	"k8s.io/kubernetes/pkg/kubelet/cm"
	"k8s.io/kubernetes/pkg/kubelet/eviction"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/spherelet/config"
)

// volumeStatsPeriod is how often guests are asked how full volumes are. The
// kubelet evicts by the answer, so an emptyDir over its sizeLimit is evicted
// within this and the eviction manager's own 10 s. Upstream's default of a
// minute is meant for walking directory trees.
const volumeStatsPeriod = 15 * time.Second

// syncFrequency is how often a running pod is looked at without a cause. It
// decides how soon a changed ConfigMap or Secret is in its volume: upstream's
// minute makes that 60 to 90 s.
const syncFrequency = 20 * time.Second

// What the kubelet asks of the API server, in requests a second. A pod's start
// takes eight (three times its status read and written, a token, its start's
// annotation); upstream's 50, and 100 at once, hold up more than a dozen pods
// that come at once by up to seconds.
const (
	apiQPS   = 200
	apiBurst = 400
)

// defaultEviction are the hard thresholds. Upstream's shares of the disk
// (10 and 15 %) are hundreds of gigabytes on the disks of today's hosts.
var defaultEviction = map[string]string{
	"memory.available":  "100Mi",
	"nodefs.available":  "5%",
	"nodefs.inodesFree": "5%",
	"imagefs.available": "5%",
}

// Reserved by default, when kubeReserved is not set: the spherelet itself
// (150 MB with ten pods) and a share of the RAM for what QEMU and the guests
// take beside what pods request.
const (
	reservedCPU          = 100       // millicores
	reservedMemory       = 256 << 20 // bytes
	reservedMemoryShare  = 20        // one byte in so many
	reservedMemoryAtMost = 4 << 30   // bytes
)

func defaultReserved(hostMemory int64) map[string]string {
	m := min(reservedMemory+hostMemory/reservedMemoryShare, reservedMemoryAtMost, hostMemory/4)
	return map[string]string{
		string(v1.ResourceCPU):    resource.NewMilliQuantity(reservedCPU, resource.DecimalSI).String(),
		string(v1.ResourceMemory): resource.NewQuantity(m>>20<<20, resource.BinarySI).String(),
	}
}

// kubeletServer is upstream's flags and configuration for ours.
func kubeletServer(c *v1alpha1.SphereletConfiguration, p config.Paths, labels map[string]string, hostMemory int64) (*options.KubeletServer, error) {
	f := options.NewKubeletFlags()
	f.RootDirectory = p.Kubelet
	f.CertDirectory = p.PKI
	f.HostnameOverride = c.NodeName
	f.KubeConfig = c.Kubeconfig
	f.BootstrapKubeconfig = c.BootstrapKubeconfig
	for k, v := range c.Labels {
		f.NodeLabels[k] = v
	}
	for k, v := range labels {
		f.NodeLabels[k] = v
	}
	k, err := options.NewKubeletConfiguration()
	if err != nil {
		return nil, err
	}
	nodeIP, err := NodeIP(c)
	if err != nil {
		return nil, err
	}
	f.NodeIP = nodeIP.String()
	k.ContainerRuntimeEndpoint = "unix://" + p.CRISocket
	k.PodLogsDir = p.PodLogs
	k.StaticPodPath = p.PodManifests
	k.Address, k.Port = nodeIP.String(), c.Port
	k.ReadOnlyPort, k.HealthzPort = 0, 0 // health is served by us
	k.ClusterDomain, k.ClusterDNS = c.ClusterDomain, c.ClusterDNS
	k.ResolverConfig = resolverConfig()
	k.MaxPods = c.MaxPods
	k.ProviderID = "atoll://" + c.NodeName
	for _, t := range c.Taints {
		taint, err := config.ParseTaint(t)
		if err != nil {
			return nil, err
		}
		k.RegisterWithTaints = append(k.RegisterWithTaints, v1.Taint{Key: taint.Key, Value: taint.Value, Effect: v1.TaintEffect(taint.Effect)})
	}
	k.KubeReserved, k.SystemReserved = c.KubeReserved, c.SystemReserved
	if k.KubeReserved == nil {
		k.KubeReserved = defaultReserved(hostMemory)
	}
	if k.EvictionHard = c.EvictionHard; k.EvictionHard == nil {
		k.EvictionHard = defaultEviction
	}
	if p := c.Images.GCHighThresholdPercent; p != nil {
		k.ImageGCHighThresholdPercent = *p
	}
	if p := c.Images.GCLowThresholdPercent; p != nil {
		k.ImageGCLowThresholdPercent = *p
	}
	k.MaxOpenFiles = maxOpenFiles(k.MaxOpenFiles)
	k.Tracing = Tracing(c)
	secure(k, c.ClientCAFile)
	withoutHost(k)
	return &options.KubeletServer{KubeletFlags: *f, KubeletConfiguration: *k}, nil
}

// Tracing is the setting as upstream's components have it; nil: none.
func Tracing(c *v1alpha1.SphereletConfiguration) *tracingapi.TracingConfiguration {
	if c.Tracing == nil {
		return nil
	}
	t := &tracingapi.TracingConfiguration{SamplingRatePerMillion: &c.Tracing.SamplingRatePerMillion}
	if c.Tracing.Endpoint != "" {
		t.Endpoint = &c.Tracing.Endpoint
	}
	return t
}

// maxOpenFiles is what the kubelet wants, or the hard limit where it may not
// be raised (a container without CAP_SYS_RESOURCE).
func maxOpenFiles(want int64) int64 {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil || l.Max >= uint64(want) {
		return want
	}
	if unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(want), Max: uint64(want)}) == nil {
		return want
	}
	return int64(l.Max)
}

// secure closes what upstream's defaults leave open.
func secure(k *kubeletconfig.KubeletConfiguration, clientCA string) {
	k.Authentication.Anonymous.Enabled = false
	k.Authentication.Webhook.Enabled = true
	k.Authentication.X509.ClientCAFile = clientCA
	k.Authorization.Mode = kubeletconfig.KubeletAuthorizationModeWebhook
	k.ServerTLSBootstrap = true
	k.RotateCertificates = true
	k.EnableProfilingHandler = false
	k.EnableDebugFlagsHandler = false
	k.EnableContentionProfiling = false
	k.EnableSystemLogHandler = false // would serve the host's /var/log
}

// withoutHost turns off what would manage containers of this host.
func withoutHost(k *kubeletconfig.KubeletConfiguration) {
	k.FailCgroupV1 = false
	k.CgroupsPerQOS = false
	k.EnforceNodeAllocatable = []string{}
	k.CgroupDriver = "cgroupfs"
	k.FailSwapOn = false
	k.MakeIPTablesUtilChains = false // would leave KUBE-IPTABLES-HINT behind
	k.OOMScoreAdj = 0                // children (the VMs) would inherit another
	k.SerializeImagePulls = false    // the image store has its own bounds
	k.RegistryPullQPS = 0
	k.KubeAPIQPS, k.KubeAPIBurst = apiQPS, apiBurst
	k.SyncFrequency = metav1.Duration{Duration: syncFrequency}
	k.VolumeStatsAggPeriod = metav1.Duration{Duration: volumeStatsPeriod}
	k.FeatureGates = map[string]bool{
		"PodAndContainerStatsFromCRI": true,
		"EventedPLEG":                 false, // pods with init containers would hang; we relist on demand
	}
}

// allocatable parses the reservations as upstream's container manager has
// them.
func allocatable(k *kubeletconfig.KubeletConfiguration) (cm.NodeAllocatableConfig, error) {
	var out cm.NodeAllocatableConfig
	var err error
	if out.KubeReserved, err = quantities("kubeReserved", k.KubeReserved); err != nil {
		return out, err
	}
	if out.SystemReserved, err = quantities("systemReserved", k.SystemReserved); err != nil {
		return out, err
	}
	out.HardEvictionThresholds, err = eviction.ParseThresholdConfig(nil, k.EvictionHard, nil, nil, nil)
	if err != nil {
		return out, fmt.Errorf("evictionHard: %w", err)
	}
	return out, nil
}

func quantities(field string, m map[string]string) (v1.ResourceList, error) {
	out := v1.ResourceList{}
	for k, v := range m {
		q, err := resource.ParseQuantity(v)
		if err != nil {
			return nil, fmt.Errorf("%s[%s] is %q: %w", field, k, v, err)
		}
		out[v1.ResourceName(k)] = q
	}
	return out, nil
}

// NodeIP is the configured address, or that of the default route's interface.
func NodeIP(c *v1alpha1.SphereletConfiguration) (netip.Addr, error) {
	if c.NodeIP != "" {
		return netip.ParseAddr(c.NodeIP)
	}
	ip, err := utilnet.ChooseHostInterface()
	if err != nil {
		return netip.Addr{}, fmt.Errorf("nodeIP is not set and there is no default route to take it from: set nodeIP: %w", err)
	}
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap(), nil
}

// resolverConfig is the file from which pods with dnsPolicy Default take
// their servers: the real one where a local stub stands in resolv.conf.
func resolverConfig() string {
	const plain, behindStub = "/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"
	b, err := os.ReadFile(plain)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 2 && f[0] == "nameserver" {
			if a, err := netip.ParseAddr(f[1]); err != nil || !a.IsLoopback() {
				return plain
			}
		}
	}
	if _, err := os.Stat(behindStub); err == nil {
		return behindStub
	}
	return plain
}
