package controlplane

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/supervisor/login"
	"github.com/openatoll/atoll/supervisor/login/loginapi"
)

// KubernetesVersion is the release that the control plane is built from, used
// when the build did not stamp k8s.io/component-base/version.
const KubernetesVersion = "v1.36.3"

// Ports on loopback, which nobody but this process and an operator uses.
const (
	controllerManagerPort = 10257
	schedulerPort         = 10259
	dnsReadyPort          = 10354
	tokenReviewPort       = 10355
)

// A Config is everything that Run must know. It is plain data: Run validates
// it and changes nothing in it.
type Config struct {
	// DataDir holds all state. Made with mode 0711 when missing, since others
	// than root may own things below it; what this package puts there is 0700
	// and 0600. Required, absolute.
	DataDir string
	// RunDir, made with mode 0711 when missing, gets a directory
	// "controlplane" of mode 0700 with the sockets. At most 75 bytes: unix
	// socket paths end at 107. Required, absolute.
	RunDir string
	// Address is the IPv4 address of the API server, DNS and metrics-server.
	// It must be on a link of the network namespace in which Run is called.
	Address netip.Addr
	// APIPort, DNSPort (udp and tcp) and MetricsPort are on Address.
	APIPort, DNSPort, MetricsPort uint16
	// LoginPort, on Address, is where users of vSphere sign in.
	LoginPort uint16
	// VSpherePort, on Address, is where vSphere's REST of namespaces is served in
	// front of a vCenter that is not embedded; 0: nowhere.
	VSpherePort uint16
	// VCenter is the embedded vCenter; nil: there is none.
	VCenter *VCenter
	// NamespacesApart leaves the controllers of namespaces to atoll-namespaces, a
	// program of its own.
	NamespacesApart bool
	// TokenLifetime is how long a login is good, 5 min to 24 h.
	TokenLifetime time.Duration
	// ServiceCIDR (a /12 to /28), PodCIDR and ClusterDomain are fixed when the
	// data directory is first used; a later Run with others is refused.
	ServiceCIDR, PodCIDR netip.Prefix
	// NodeMask is the length of each node's part of PodCIDR.
	NodeMask int
	// DNSAddress is the cluster's resolver, in ServiceCIDR.
	DNSAddress    netip.Addr
	ClusterDomain string
	// DNSUpstreams ("192.0.2.1" or "192.0.2.1:53") answer names outside of
	// ClusterDomain; none: such names get NXDOMAIN at once.
	DNSUpstreams []string
	// ExtraSANs are further names and addresses of the API server.
	ExtraSANs []string
	// BootstrapTokenTTL is how long a token for joining nodes is good; a new
	// one is made when a third is left. 1 h to 30 d.
	BootstrapTokenTTL time.Duration
	// Audit writes a metadata-level audit log to DataDir/log/audit.log.
	Audit bool
}

// Default returns a Config with the address plan of a single machine.
func Default(dataDir string) Config {
	if abs, err := filepath.Abs(dataDir); err == nil {
		dataDir = abs
	}
	return Config{
		DataDir:           dataDir,
		RunDir:            DefaultRunDir(dataDir),
		Address:           netip.MustParseAddr("198.18.0.1"),
		APIPort:           6443,
		DNSPort:           53,
		MetricsPort:       4443,
		LoginPort:         loginapi.DefaultPort,
		VSpherePort:       DefaultVSpherePort,
		TokenLifetime:     login.DefaultTokenLifetime,
		ServiceCIDR:       netip.MustParsePrefix("198.18.64.0/18"),
		PodCIDR:           netip.MustParsePrefix("198.19.0.0/16"),
		NodeMask:          24,
		DNSAddress:        netip.MustParseAddr("198.18.64.10"),
		ClusterDomain:     "cluster.local",
		BootstrapTokenTTL: 24 * time.Hour,
		Audit:             true,
	}
}

// DefaultRunDir is /run/atoll/ and the first 8 hex digits of the SHA-256 of
// the data directory's path.
func DefaultRunDir(dataDir string) string {
	sum := sha256.Sum256([]byte(filepath.Clean(dataDir)))
	return filepath.Join("/run/atoll", hex.EncodeToString(sum[:4]))
}

// Kubeconfig is the administrator's.
func (c Config) Kubeconfig() string { return filepath.Join(c.DataDir, "kubeconfig") }

// BootstrapKubeconfig is what a node joins with; rewritten when the token in
// it is replaced.
func (c Config) BootstrapKubeconfig() string {
	return filepath.Join(c.DataDir, "bootstrap.kubeconfig")
}

// ClientCAFile is the authority of every client and kubelet certificate.
func (c Config) ClientCAFile() string { return c.pkiPath("ca.crt") }

// LogFile is where the caller is expected to send standard error.
func (c Config) LogFile() string { return filepath.Join(c.DataDir, "log", "supervisor.log") }

// Server is the API server's URL.
func (c Config) Server() string {
	return "https://" + netip.AddrPortFrom(c.Address, c.APIPort).String()
}

// KubernetesServiceAddress is the first address of ServiceCIDR.
func (c Config) KubernetesServiceAddress() netip.Addr { return c.ServiceCIDR.Masked().Addr().Next() }

func (c Config) pkiPath(elem ...string) string {
	return filepath.Join(append([]string{c.DataDir, "pki"}, elem...)...)
}

func (c Config) componentKubeconfig(name string) string {
	return c.pkiPath("kubeconfig", name+".kubeconfig")
}

func (c Config) etcdDir() string        { return filepath.Join(c.DataDir, "etcd") }
func (c Config) socketDir() string      { return filepath.Join(c.RunDir, "controlplane") }
func (c Config) etcdSocket() string     { return filepath.Join(c.socketDir(), "etcd.sock") }
func (c Config) etcdEndpoint() string   { return "unix://" + c.etcdSocket() }
func (c Config) healthSocket() string   { return filepath.Join(c.socketDir(), "supervisor.sock") }
func (c Config) lockFile() string       { return filepath.Join(c.DataDir, "controlplane.lock") }
func (c Config) versionFile() string    { return filepath.Join(c.DataDir, "version") }
func (c Config) clusterFile() string    { return filepath.Join(c.DataDir, "cluster.json") }
func (c Config) encryptionFile() string { return c.pkiPath("encryption.yaml") }

// unsafePathCharacters end a word, a list's entry or a URL's path in CoreDNS'
// configuration, upstream's flags or etcd's endpoints.
const unsafePathCharacters = " \t\r\n\"'`{}#\\,?%"

// Validate returns an ErrInvalidArgument that names the first field that is
// wrong, what it was and what it must be.
func (c Config) Validate() error {
	bad := func(field string, value any, want string) error {
		return fmt.Errorf("control plane: %s is %v, must be %s: %w", field, value, want, errdefs.ErrInvalidArgument)
	}
	maskedIPv4 := func(p netip.Prefix) bool { return p.IsValid() && p.Addr().Is4() && p == p.Masked() }
	switch {
	case !filepath.IsAbs(c.DataDir):
		return bad("DataDir", c.DataDir, "an absolute path")
	case !filepath.IsAbs(c.RunDir):
		return bad("RunDir", c.RunDir, "an absolute path")
	case strings.ContainsAny(c.DataDir+c.RunDir, unsafePathCharacters):
		return bad("DataDir or RunDir", fmt.Sprintf("%q, %q", c.DataDir, c.RunDir), "free of spaces, quotes and "+`{}#\,?%`+", which the components' configurations cannot hold")
	case len(c.RunDir) > 75:
		return bad("RunDir", c.RunDir, "at most 75 bytes long, because socket paths end at 107")
	case !c.Address.Is4() || c.Address.IsUnspecified() || c.Address.IsLoopback() || c.Address.IsMulticast():
		return bad("Address", c.Address, "an IPv4 address of a link, neither unspecified nor loopback")
	case c.APIPort == 0, c.DNSPort == 0, c.MetricsPort == 0:
		return bad("APIPort, DNSPort or MetricsPort", 0, "1 to 65535")
	case c.LoginPort == 0 || c.LoginPort == c.APIPort || c.LoginPort == c.DNSPort || c.LoginPort == c.MetricsPort:
		return bad("LoginPort", c.LoginPort, "1 to 65535, and another port than APIPort, DNSPort and MetricsPort")
	case c.TokenLifetime < 5*time.Minute || c.TokenLifetime > 24*time.Hour:
		return bad("TokenLifetime", c.TokenLifetime, "5 min to 24 h")
	case c.APIPort == c.DNSPort || c.APIPort == c.MetricsPort || c.DNSPort == c.MetricsPort:
		return bad("MetricsPort", c.MetricsPort, "another port than APIPort and DNSPort, which differ too")
	case !maskedIPv4(c.ServiceCIDR) || c.ServiceCIDR.Bits() < 12 || c.ServiceCIDR.Bits() > 28:
		return bad("ServiceCIDR", c.ServiceCIDR, "an IPv4 prefix of /12 to /28 without host bits")
	case !maskedIPv4(c.PodCIDR):
		return bad("PodCIDR", c.PodCIDR, "an IPv4 prefix without host bits")
	case c.NodeMask < c.PodCIDR.Bits() || c.NodeMask > 30 || c.NodeMask-c.PodCIDR.Bits() > 16:
		return bad("NodeMask", c.NodeMask, "between PodCIDR's length and 30, at most 16 bits more than it")
	case c.PodCIDR.Overlaps(c.ServiceCIDR):
		return bad("PodCIDR", c.PodCIDR, "apart from ServiceCIDR "+c.ServiceCIDR.String())
	case c.ServiceCIDR.Contains(c.Address) || c.PodCIDR.Contains(c.Address):
		return bad("Address", c.Address, "outside of ServiceCIDR and PodCIDR")
	case !c.ServiceCIDR.Contains(c.DNSAddress) || c.DNSAddress == c.KubernetesServiceAddress() || c.DNSAddress == c.ServiceCIDR.Addr():
		return bad("DNSAddress", c.DNSAddress, "in ServiceCIDR and neither its network nor its first address")
	case !validDomain(c.ClusterDomain):
		return bad("ClusterDomain", c.ClusterDomain, "a lower-case DNS name without a final dot")
	case c.BootstrapTokenTTL < time.Hour || c.BootstrapTokenTTL > 30*24*time.Hour:
		return bad("BootstrapTokenTTL", c.BootstrapTokenTTL, "1 h to 30 d")
	}
	taken := []uint16{c.APIPort, c.DNSPort, c.MetricsPort, c.LoginPort}
	if c.VSpherePort != 0 && slices.Contains(taken, c.VSpherePort) {
		return bad("VSpherePort", c.VSpherePort, "another port than APIPort, DNSPort, MetricsPort and LoginPort")
	}
	if v := c.VCenter; v != nil && (v.Port == 0 || slices.Contains(append(taken, c.VSpherePort), v.Port)) {
		return bad("VCenter.Port", v.Port, "1 to 65535, and another port than APIPort, DNSPort, MetricsPort, LoginPort and VSpherePort")
	}
	for _, u := range c.DNSUpstreams {
		if _, err := parseUpstream(u); err != nil {
			return bad("DNSUpstreams", u, "an address, or address:port, and not the cluster's own")
		}
	}
	return nil
}

// parseUpstream accepts "address" and "address:port".
func parseUpstream(s string) (netip.AddrPort, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.AddrPortFrom(a, 53), nil
	}
	return netip.ParseAddrPort(s)
}

func validDomain(s string) bool {
	if s == "" || len(s) > 200 {
		return false
	}
	return !slices.ContainsFunc(strings.Split(s, "."), func(label string) bool {
		return label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" ||
			strings.HasPrefix(label, "-") || strings.HasSuffix(label, "-")
	})
}

// A Phase is one completed step of a start, for showing line by line.
type Phase struct {
	// Name is one of the Phase constants.
	Name string
	// Took is the time since the phase before ended.
	Took time.Duration
	// Detail is a short sentence for a person; may be empty.
	Detail string
}

// The phases of a start, in this order.
const (
	PhasePKI               = "pki"
	PhaseEtcd              = "etcd"
	PhaseVCenter           = "vcenter" // if there is one
	PhaseAPIServer         = "apiserver"
	PhaseControllerManager = "controller-manager"
	PhaseScheduler         = "scheduler"
	PhaseAddons            = "addons"
	PhaseDNS               = "dns"
	PhaseMetrics           = "metrics"
	// PhaseReady says that all of it is up and the default ServiceAccount
	// exists: pods can be created.
	PhaseReady = "ready"
)

// ComponentHealth is the state of one component.
type ComponentHealth struct {
	// Name is etcd, kube-apiserver, kube-controller-manager, kube-scheduler,
	// dns, metrics-server, csr-approver, login or namespaces.
	Name    string `json:"name"`
	Healthy bool   `json:"healthy"`
	// Message says what is wrong, or what the component answered.
	Message string `json:"message,omitempty"`
}

// BackupHeader is the first entry of a backup file.
type BackupHeader struct {
	// Format is the version of the file's layout; this package writes and
	// reads backupFormat and reads older ones.
	Format int `json:"format"`
	// DataVersion is the data directory's version it was taken from.
	DataVersion       int       `json:"dataVersion"`
	KubernetesVersion string    `json:"kubernetesVersion"`
	Created           time.Time `json:"created"`
	// Revision is etcd's, at the snapshot.
	Revision int64 `json:"revision"`
	// Cluster are the ranges that the cluster cannot change.
	Cluster Cluster `json:"cluster"`
	// Files in the order in which they follow.
	Files []BackupFile `json:"files"`
}

// A BackupFile is one file in a backup.
type BackupFile struct {
	Name   string `json:"name"` // relative to the data directory, or "etcd.snapshot"
	Size   int64  `json:"size"` // bytes
	SHA256 string `json:"sha256"`
}

// Cluster is what is fixed when a data directory is first used.
type Cluster struct {
	ServiceCIDR   netip.Prefix `json:"serviceCIDR"`
	PodCIDR       netip.Prefix `json:"podCIDR"`
	NodeMask      int          `json:"nodeMask"`
	ClusterDomain string       `json:"clusterDomain"`
	// KubernetesVersion is the newest that has ever written to the data.
	KubernetesVersion string `json:"kubernetesVersion"`
}
