package cluster

import (
	"fmt"
	"net/netip"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/yaml"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/supervisor/controlplane"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// ControlPlaneConfig is the control plane's configuration of this cluster.
func ControlPlaneConfig(l Layout, s State) controlplane.Config {
	c := controlplane.Default(l.DataDir())
	if !s.Isolated {
		// Without upstreams names outside of the cluster do not resolve, and
		// that is all: a host without resolv.conf is no reason to fail.
		c.DNSUpstreams, _ = controlplane.HostResolvers("/etc/resolv.conf")
	}
	c.NamespacesApart = s.NamespacesApart
	if s.TokenLifetime != 0 {
		c.TokenLifetime = s.TokenLifetime
	}
	c.VCenter = &controlplane.VCenter{Port: controlplane.DefaultVCenterPort}
	if s.Node != "" {
		c.VCenter.Hosts = []vcsim.Host{thisHost(s.Node)}
	}
	return c
}

// thisHost is what the embedded vCenter shows of the node.
func thisHost(node string) vcsim.Host {
	h := vcsim.Host{Name: node, CPUs: runtime.NumCPU()}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		h.Memory = int64(info.Totalram) * int64(info.Unit)
	}
	return h
}

// NodeRange holds the addresses of all nodes.
func NodeRange(c controlplane.Config) netip.Prefix { return netip.PrefixFrom(c.Address, 18).Masked() }

// sphereletConfig is the node agent's configuration.
func sphereletConfig(l Layout, s State, a Assets) v1alpha1.SphereletConfiguration {
	c := ControlPlaneConfig(l, s)
	proxy := true
	return v1alpha1.SphereletConfiguration{
		APIVersion:          v1alpha1.GroupVersion,
		Kind:                v1alpha1.SphereletKind,
		NodeName:            s.Node,
		NodeIP:              c.Address.String(),
		Labels:              map[string]string{corev1.LabelTopologyZone: controlplane.VCenterZone},
		DataDir:             l.NodeDir(s.Node),
		RunDir:              l.NodeRunDir(s.Node),
		BootstrapKubeconfig: c.BootstrapKubeconfig(),
		ClientCAFile:        c.ClientCAFile(),
		ClusterDNS:          []string{c.DNSAddress.String()},
		ClusterDomain:       c.ClusterDomain,
		NetworkNamespace:    s.Netns(l),
		KubeProxy:           &proxy,
		ClusterCIDR:         c.PodCIDR.String(),
		Hypervisor:          v1alpha1.HypervisorConfiguration{Guest: a.Guest},
		EvictionHard:        evictionHard(),
		Images: v1alpha1.ImagesConfiguration{
			HostsDir: l.HostsDir(), GCHighThresholdPercent: ptr.To[int32](100),
		},
	}
}

// evictionHard keeps so much of the disk free as a cluster needs to go on
// (preflight asks for twice that), and images stay however full the disk is:
// the disk of a machine on which somebody tries a cluster is full of their own
// things, and a share of it says nothing of the pods. kind does the same.
func evictionHard() map[string]string {
	return map[string]string{
		"memory.available":  "100Mi",
		"nodefs.available":  "1Gi",
		"nodefs.inodesFree": "5%",
		"imagefs.available": "1Gi",
	}
}

// writeSphereletConfig writes the node agent's configuration file. It is
// rewritten by each `up`: what an administrator wants different belongs to
// flags of `up`, or to a spherelet of their own.
func writeSphereletConfig(l Layout, s State, a Assets) error {
	b, err := yaml.Marshal(sphereletConfig(l, s, a))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(l.NodeDir(s.Node), 0o711); err != nil {
		return fmt.Errorf("node's data directory: %w", err)
	}
	head := []byte("# Written by `atoll up`.\n")
	return replace(l.SphereletConfig(s.Node), append(head, b...), 0o600)
}
