package controlplane

import (
	"bufio"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestDefaultIsValid(t *testing.T) {
	c := Default("/var/lib/atoll")
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	if got := c.KubernetesServiceAddress().String(); got != "198.18.64.1" {
		t.Errorf("kubernetes Service at %s", got)
	}
	if c.Server() != "https://198.18.0.1:6443" {
		t.Errorf("server %s", c.Server())
	}
}

func TestValidateNamesTheField(t *testing.T) {
	for field, change := range map[string]func(*Config){
		"DataDir":           func(c *Config) { c.DataDir = "relative" },
		"DataDir or RunDir": func(c *Config) { c.DataDir = "/a b" },
		"RunDir":            func(c *Config) { c.RunDir = "/" + strings.Repeat("x", 90) },
		"Address":           func(c *Config) { c.Address = netip.MustParseAddr("0.0.0.0") },
		"Address ":          func(c *Config) { c.Address = netip.MustParseAddr("fd00::1") },
		"Address is 198.18": func(c *Config) { c.Address = netip.MustParseAddr("198.18.64.9") },
		"APIPort":           func(c *Config) { c.APIPort = 0 },
		"MetricsPort":       func(c *Config) { c.MetricsPort = c.APIPort },
		"ServiceCIDR":       func(c *Config) { c.ServiceCIDR = netip.MustParsePrefix("10.0.0.0/8") },
		"ServiceCIDR is":    func(c *Config) { c.ServiceCIDR = netip.MustParsePrefix("198.18.64.1/18") },
		"PodCIDR":           func(c *Config) { c.PodCIDR = netip.Prefix{} },
		"PodCIDR is":        func(c *Config) { c.PodCIDR = netip.MustParsePrefix("198.18.64.0/20") },
		"NodeMask":          func(c *Config) { c.NodeMask = 15 },
		"DNSAddress":        func(c *Config) { c.DNSAddress = netip.MustParseAddr("198.18.64.1") },
		"DNSAddress is":     func(c *Config) { c.DNSAddress = netip.MustParseAddr("198.20.0.1") },
		"ClusterDomain":     func(c *Config) { c.ClusterDomain = "Cluster.local." },
		"DNSUpstreams":      func(c *Config) { c.DNSUpstreams = []string{"dns.example"} },
		"BootstrapTokenTTL": func(c *Config) { c.BootstrapTokenTTL = time.Minute },
	} {
		c := Default("/var/lib/atoll")
		change(&c)
		if err := c.Validate(); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), strings.TrimSpace(field)) {
			t.Errorf("%s: %v", field, err)
		}
	}
}

// TestKubernetesVersion holds the constant to go.mod.
func TestKubernetesVersion(t *testing.T) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		t.Skip("no build information")
	}
	for _, m := range info.Deps {
		if m.Path == "k8s.io/kubernetes" && m.Version != KubernetesVersion {
			t.Errorf("KubernetesVersion is %s, go.mod has %s", KubernetesVersion, m.Version)
		}
	}
}

func TestCheckDataDir(t *testing.T) {
	for content, is := range map[string]func(error) bool{
		"1\n":   func(err error) bool { return err == nil },
		"2\n":   errdefs.IsFailedPrecondition,
		"0":     errdefs.IsInvalidArgument,
		"hello": errdefs.IsInvalidArgument,
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "version"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := CheckDataDir(dir); !is(err) {
			t.Errorf("version %q: %v", content, err)
		}
	}
	if err := CheckDataDir(filepath.Join(t.TempDir(), "none")); err != nil {
		t.Errorf("no directory: %v", err)
	}
}

func TestPrepareDataDir(t *testing.T) {
	c := Default(t.TempDir())
	c.RunDir = t.TempDir()
	if err := prepareDataDir(c); err != nil {
		t.Fatal(err)
	}
	if err := prepareDataDir(c); err != nil {
		t.Fatalf("second time: %v", err)
	}
	other := c
	other.PodCIDR = netip.MustParsePrefix("198.20.0.0/16")
	if err := prepareDataDir(other); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "PodCIDR 198.19.0.0/16") {
		t.Errorf("another PodCIDR: %v", err)
	}
	cl, err := readCluster(c)
	if err != nil {
		t.Fatal(err)
	}
	cl.KubernetesVersion = "v1.99.0"
	if err := writeCluster(c, cl); err != nil {
		t.Fatal(err)
	}
	if err := prepareDataDir(c); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "v1.99.0") {
		t.Errorf("data of a newer Kubernetes: %v", err)
	}
	if err := os.Remove(c.versionFile()); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(c.clusterFile()); err != nil {
		t.Fatal(err)
	}
	if err := prepareDataDir(c); err != nil {
		t.Errorf("what a start that was cut short leaves: %v", err)
	}
	if err := os.Remove(c.versionFile()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.pkiPath("ca.key"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := prepareDataDir(c); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "version") {
		t.Errorf("data without a version: %v", err)
	}
}

func TestLostEncryptionKeyIsRefused(t *testing.T) {
	c := Default(t.TempDir())
	c.RunDir = t.TempDir()
	if err := prepareDataDir(c); err != nil {
		t.Fatal(err)
	}
	renewed, err := ensureIdentities(c, time.Now())
	if err != nil || len(renewed) != len(c.leaves())+1 {
		t.Fatalf("%d certificates, err %v", len(renewed), err)
	}
	if renewed, err = ensureIdentities(c, time.Now()); err != nil || len(renewed) != 0 {
		t.Fatalf("second time: %v renewed, err %v", renewed, err)
	}
	// Eight months and a day later every certificate has less than a third.
	before, err := os.ReadFile(c.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	if renewed, err = ensureIdentities(c, time.Now().Add(245*24*time.Hour)); err != nil || len(renewed) != len(c.leaves())+1 {
		t.Fatalf("near expiry: %d renewed, err %v", len(renewed), err)
	}
	if after, err := os.ReadFile(c.Kubeconfig()); err != nil || string(after) == string(before) {
		t.Errorf("the administrator's kubeconfig was not renewed (err %v)", err)
	}
	if err := os.WriteFile(filepath.Join(c.etcdDir(), "member"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(c.encryptionFile()); err != nil {
		t.Fatal(err)
	}
	if _, err := ensureIdentities(c, time.Now()); err == nil || !strings.Contains(err.Error(), "encryption.yaml is missing") {
		t.Errorf("a new key over old Secrets: %v", err)
	}
}

func TestListenerInode(t *testing.T) {
	const tcp = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1 0 100 0 0 10 0
   1: 00000000:192B 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 222 1 0 100 0 0 10 0
   2: 010012C6:0016 0200A8C0:C001 01 00000000:00000000 00:00000000 00000000     0        0 333 1 0 100 0 0 10 0
   3: 010012C6:0035 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 444 1 0 100 0 0 10 0
`
	for addr, want := range map[string]string{
		"198.18.0.1:6443": "222", // on all addresses
		"198.18.0.1:53":   "444",
		"198.18.0.1:8080": "", // on loopback alone
		"198.18.0.1:22":   "", // a connection, not a listener
		"198.18.0.2:53":   "",
		"127.0.0.1:8080":  "111",
	} {
		if got := listenerInode(bufio.NewScanner(strings.NewReader(tcp)), "tcp", netip.MustParseAddrPort(addr)); got != want {
			t.Errorf("%s: inode %q, want %q", addr, got, want)
		}
	}
}

func TestPortCheckNamesTheHolder(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p := port{"tcp", netip.MustParseAddrPort(l.Addr().String()), "a test", "stop it"}
	err = p.check()
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "in use by process ") || !strings.Contains(err.Error(), "stop it") {
		t.Errorf("port in use: %v", err)
	}
	l.Close()
	if err := p.check(); err != nil {
		t.Errorf("free port: %v", err)
	}
}

// A port of an address that is on no link yet is taken by who listens on all.
func TestPortCheckOfAnAbsentAddress(t *testing.T) {
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := netip.AddrPortFrom(netip.MustParseAddr("198.51.100.7"), uint16(l.Addr().(*net.TCPAddr).Port))
	for _, network := range []string{"tcp", "udp"} {
		err := port{network, taken, "a test", "stop it"}.check()
		if network == "tcp" && !errdefs.IsUnavailable(err) || network == "udp" && err != nil {
			t.Errorf("%s: %v", network, err)
		}
	}
	l.Close()
	if err := (port{"tcp", taken, "a test", "stop it"}).check(); err != nil {
		t.Errorf("free port: %v", err)
	}
}

func TestHostResolvers(t *testing.T) {
	file := filepath.Join(t.TempDir(), "resolv.conf")
	const content = `# comment
search example.com
nameserver 127.0.0.53
nameserver ::1
nameserver 192.0.2.1
nameserver 192.0.2.1
nameserver 2001:db8::1
nameserver fe80::1%eth0
nameserver 0.0.0.0
nameserver nonsense
options ndots:5
`
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := HostResolvers(file)
	if want := []string{"192.0.2.1", "2001:db8::1"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v (err %v), want %v", got, err, want)
	}
	if _, err := HostResolvers(file + ".none"); err == nil {
		t.Error("a missing file is no error")
	}
}

func TestNewToken(t *testing.T) {
	seen := map[string]bool{}
	for range 100 {
		id, secret, err := newToken()
		if err != nil || len(id) != 6 || len(secret) != 16 || strings.Trim(id+secret, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
			t.Fatalf("%q.%q, err %v", id, secret, err)
		}
		if seen[secret] {
			t.Fatal("the same secret twice")
		}
		seen[secret] = true
	}
}
