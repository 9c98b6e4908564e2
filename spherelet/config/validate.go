package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// validateNode checks what only a node needs.
func validateNode(c *v1alpha1.SphereletConfiguration) error {
	var errs []error
	if !filepath.IsAbs(c.ClientCAFile) {
		errs = append(errs, invalid("clientCAFile is %q, must be the absolute path of the certificate authority of the node's clients", c.ClientCAFile))
	}
	if c.ClusterCIDR == "" && *c.KubeProxy {
		errs = append(errs, invalid("clusterCIDR is \"\", must be the range of all pods (or set kubeProxy: false)"))
	}
	return errors.Join(errs...)
}

// validate returns every wrong value at once.
func validate(c *v1alpha1.SphereletConfiguration) error {
	var errs []error
	bad := func(field string, value any, want string) {
		errs = append(errs, invalid("%s is %q, must be %s", field, fmt.Sprint(value), want))
	}
	if m := validation.IsDNS1123Subdomain(c.NodeName); len(m) > 0 {
		bad("nodeName", c.NodeName, "a DNS name: "+strings.Join(m, ", "))
	} else if c.NodeName == "localhost" {
		bad("nodeName", c.NodeName, "a name that is unique in the cluster: set nodeName or the host's name")
	}
	if c.NodeIP != "" {
		if ip, err := netip.ParseAddr(c.NodeIP); err != nil || ip.IsLoopback() || ip.IsUnspecified() {
			bad("nodeIP", c.NodeIP, "one address of this host that other nodes reach")
		}
	}
	if !filepath.IsAbs(c.DataDir) {
		bad("dataDir", c.DataDir, "an absolute path")
	}
	if !filepath.IsAbs(c.RunDir) || len(c.RunDir) > 60 {
		bad("runDir", c.RunDir, "an absolute path of at most 60 bytes, because socket paths end at 107")
	}
	for field, path := range map[string]string{"kubeconfig": c.Kubeconfig, "bootstrapKubeconfig": c.BootstrapKubeconfig,
		"hypervisor.guest": c.Hypervisor.Guest, "images.hostsDir": c.Images.HostsDir} {
		if path != "" && !filepath.IsAbs(path) {
			bad(field, path, "an absolute path")
		}
	}
	errs = append(errs, validateStorage(c)...)
	if c.Hypervisor.Guest == "" {
		bad("hypervisor.guest", "", "the directory that `make guest` writes (kernel and initramfs)")
	}
	errs = append(errs, validatePorts(c)...)
	errs = append(errs, validateCluster(c)...)
	errs = append(errs, validateAmounts(c)...)
	errs = append(errs, validateHostDirectories(c)...)
	return errors.Join(errs...)
}

func validatePorts(c *v1alpha1.SphereletConfiguration) (errs []error) {
	if c.Port < 1 || c.Port > 65535 {
		errs = append(errs, invalid("port is %d, must be 1 to 65535", c.Port))
	}
	if c.HealthPort != -1 && (c.HealthPort < 1 || c.HealthPort > 65535) {
		errs = append(errs, invalid("healthPort is %d, must be 1 to 65535, or -1 for none", c.HealthPort))
	}
	if c.HealthPort == c.Port {
		errs = append(errs, invalid("healthPort and port are both %d, must differ", c.Port))
	}
	return errs
}

func validateCluster(c *v1alpha1.SphereletConfiguration) (errs []error) {
	for i, ip := range c.ClusterDNS {
		if net.ParseIP(ip) == nil {
			errs = append(errs, invalid("clusterDNS[%d] is %q, must be an IP address", i, ip))
		}
	}
	if m := validation.IsDNS1123Subdomain(c.ClusterDomain); len(m) > 0 {
		errs = append(errs, invalid("clusterDomain is %q, must be a DNS name", c.ClusterDomain))
	}
	if c.ClusterCIDR != "" {
		for _, s := range strings.Split(c.ClusterCIDR, ",") {
			if _, err := netip.ParsePrefix(s); err != nil {
				errs = append(errs, invalid("clusterCIDR is %q, must be a range like 198.19.0.0/16", c.ClusterCIDR))
			}
		}
	}
	for k, v := range c.Labels {
		if m := validation.IsQualifiedName(k); len(m) > 0 {
			errs = append(errs, invalid("labels[%s]: the key must be a label name", k))
		}
		if m := validation.IsValidLabelValue(v); len(m) > 0 {
			errs = append(errs, invalid("labels[%s] is %q, must be a label value", k, v))
		}
		if reservedLabel(k) {
			errs = append(errs, invalid("labels[%s]: a node may not set this label on itself, use a name outside of kubernetes.io or the prefix node.kubernetes.io/", k))
		}
	}
	for i, t := range c.Taints {
		if _, err := ParseTaint(t); err != nil {
			errs = append(errs, invalid("taints[%d] is %q, must be key=value:Effect, Effect one of NoSchedule, PreferNoSchedule, NoExecute", i, t))
		}
	}
	return errs
}

// reservedLabel reports labels that the API server's NodeRestriction would
// refuse, or that Atoll sets itself.
func reservedLabel(key string) bool {
	prefix, name, ok := strings.Cut(key, "/")
	if !ok {
		return false
	}
	if prefix == "atoll.dev" {
		return true
	}
	in := func(domain string) bool { return prefix == domain || strings.HasSuffix(prefix, "."+domain) }
	if !in("kubernetes.io") && !in("k8s.io") {
		return false
	}
	if in("node.kubernetes.io") || in("kubelet.kubernetes.io") {
		return false
	}
	allowed := []string{"topology.kubernetes.io/region", "topology.kubernetes.io/zone", "kubernetes.io/os", "kubernetes.io/arch", "kubernetes.io/hostname"}
	return !slices.Contains(allowed, prefix+"/"+name)
}

// A Taint is one parsed entry of taints.
type Taint struct{ Key, Value, Effect string }

// ParseTaint reads "key=value:Effect" or "key:Effect".
func ParseTaint(s string) (Taint, error) {
	kv, effect, ok := strings.Cut(s, ":")
	key, value, _ := strings.Cut(kv, "=")
	if !ok || len(validation.IsQualifiedName(key)) > 0 || len(validation.IsValidLabelValue(value)) > 0 ||
		!slices.Contains([]string{"NoSchedule", "PreferNoSchedule", "NoExecute"}, effect) {
		return Taint{}, invalid("taint %q", s)
	}
	return Taint{Key: key, Value: value, Effect: effect}, nil
}

func validateAmounts(c *v1alpha1.SphereletConfiguration) (errs []error) {
	if c.MaxPods < 1 || c.MaxPods > 1000 {
		errs = append(errs, invalid("maxPods is %d, must be 1 to 1000", c.MaxPods))
	}
	for name, list := range map[string]map[string]string{"kubeReserved": c.KubeReserved, "systemReserved": c.SystemReserved} {
		for k, v := range list {
			if !slices.Contains([]string{"cpu", "memory", "ephemeral-storage", "pid"}, k) {
				errs = append(errs, invalid("%s[%s]: the key must be cpu, memory, ephemeral-storage or pid", name, k))
			}
			if q, err := resource.ParseQuantity(v); err != nil || q.Sign() < 0 {
				errs = append(errs, invalid("%s[%s] is %q, must be a quantity like 200m or 512Mi", name, k, v))
			}
		}
	}
	h := c.Hypervisor
	if q, err := resource.ParseQuantity(h.EphemeralDefault); err != nil || q.Value() < 64<<20 {
		errs = append(errs, invalid("hypervisor.ephemeralDefault is %q, must be a quantity of at least 64Mi", h.EphemeralDefault))
	}
	if !slices.Contains([]string{AcceleratorAuto, AcceleratorKVM, AcceleratorTCG}, h.Accelerator) {
		errs = append(errs, invalid("hypervisor.accelerator is %q, must be auto, kvm or tcg", h.Accelerator))
	}
	if q, err := resource.ParseQuantity(c.Templates.Memory); err != nil || q.Value() < 64<<20 {
		errs = append(errs, invalid("templates.memory is %q, must be a quantity of at least 64Mi", c.Templates.Memory))
	}
	if n := c.Templates.Warm; n < 0 || n > 64 {
		errs = append(errs, invalid("templates.warm is %d, must be 0 to 64", n))
	}
	if q, err := resource.ParseQuantity(c.Images.MaxUnpackedSize); err != nil || q.Value() < 64<<20 {
		errs = append(errs, invalid("images.maxUnpackedSize is %q, must be a quantity of at least 64Mi", c.Images.MaxUnpackedSize))
	}
	if n := c.Images.MaxConcurrentDownloads; n < 1 || n > 32 {
		errs = append(errs, invalid("images.maxConcurrentDownloads is %d, must be 1 to 32", n))
	}
	if high, low := *c.Images.GCHighThresholdPercent, *c.Images.GCLowThresholdPercent; low < 0 || low >= high || high > 100 {
		errs = append(errs, invalid("images.gcHighThresholdPercent is %d and images.gcLowThresholdPercent %d, must be 0 to 100, the low one below the high one", high, low))
	}
	errs = append(errs, validDuration("images.progressTimeout", c.Images.ProgressTimeout), validDuration("streaming.idleTimeout", c.Streaming.IdleTimeout))
	errs = append(errs, validTracing(c.Tracing))
	if (c.Streaming.CertFile == "") != (c.Streaming.KeyFile == "") {
		errs = append(errs, invalid("streaming.certFile is %q and streaming.keyFile %q, must be set both or not at all", c.Streaming.CertFile, c.Streaming.KeyFile))
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, c.LogLevel) {
		errs = append(errs, invalid("logLevel is %q, must be debug, info, warn or error", c.LogLevel))
	}
	if c.KubeletVerbosity < 0 || c.KubeletVerbosity > maxKubeletVerbosity {
		errs = append(errs, invalid("kubeletVerbosity is %d, must be 0 to %d (more would write the bodies of Secrets into the log)", c.KubeletVerbosity, maxKubeletVerbosity))
	}
	return errs
}

// validDuration wants a value, if there is one, to be a duration of a second at
// least.
func validDuration(field, v string) error {
	if d, err := time.ParseDuration(v); v != "" && (err != nil || d < time.Second) {
		return invalid("%s is %q, must be a duration of at least 1s, such as 5m", field, v)
	}
	return nil
}

func validTracing(t *v1alpha1.TracingConfiguration) error {
	if t == nil {
		return nil
	}
	var errs []error
	if _, port, err := net.SplitHostPort(t.Endpoint); t.Endpoint != "" && (err != nil || port == "") {
		errs = append(errs, invalid("tracing.endpoint is %q, must be host:port", t.Endpoint))
	}
	if t.SamplingRatePerMillion < 0 || t.SamplingRatePerMillion > 1e6 {
		errs = append(errs, invalid("tracing.samplingRatePerMillion is %d, must be 0 to 1000000", t.SamplingRatePerMillion))
	}
	return errors.Join(errs...)
}
