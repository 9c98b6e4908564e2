package proxy

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/netplugin/netplugintest"
	"github.com/openatoll/atoll/netplugin/tap"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	networking "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes/fake"
)

func TestMain(m *testing.M) { netplugintest.Isolate(m) }

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// serve answers every connection with a word.
func serve(t *testing.T, addr, word string) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, word)
			c.Close()
		}
	}()
}

func read(addr string) (string, error) {
	c, err := net.DialTimeout("tcp", addr, time.Second)
	if err != nil {
		return "", err
	}
	defer c.Close()
	b, err := io.ReadAll(c)
	return string(b), err
}

// eventually retries for the time that a sync may take.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}

func service(name, ip string, nodePort int32) *v1.Service {
	return &v1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec: v1.ServiceSpec{
			Type: v1.ServiceTypeNodePort, ClusterIP: ip, ClusterIPs: []string{ip}, IPFamilies: []v1.IPFamily{v1.IPv4Protocol},
			Ports: []v1.ServicePort{{Protocol: v1.ProtocolTCP, Port: 80, TargetPort: intstr.FromInt32(8080), NodePort: nodePort}},
		},
	}
}

func endpoints(name string, addrs ...string) *discovery.EndpointSlice {
	port, proto, ready, empty := int32(8080), v1.ProtocolTCP, true, ""
	s := &discovery.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{discovery.LabelServiceName: name}},
		AddressType: discovery.AddressTypeIPv4,
		Ports:       []discovery.EndpointPort{{Name: &empty, Port: &port, Protocol: &proto}},
	}
	for _, a := range addrs {
		s.Endpoints = append(s.Endpoints, discovery.Endpoint{Addresses: []string{a}, Conditions: discovery.EndpointConditions{Ready: &ready, Serving: &ready}})
	}
	return s
}

func TestServices(t *testing.T) {
	netplugintest.Isolated(t)
	if _, err := exec.LookPath("nft"); err != nil {
		t.Skip(err)
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := tap.EnsureNodeLink(t.Context(), "atoll0", []netip.Prefix{prefix("198.18.0.1/32"), prefix("198.18.0.77/32")}, prefix("198.18.64.0/18")); err != nil {
		t.Fatal(err)
	}
	if err := tap.EnsureNodeLink(t.Context(), "pods0", []netip.Prefix{prefix("198.19.7.2/32"), prefix("198.19.7.3/32")}); err != nil {
		t.Fatal(err)
	}
	serve(t, "198.19.7.2:8080", "two")
	serve(t, "198.19.7.3:8080", "three")

	client := fake.NewClientset(
		&v1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1"}},
		&networking.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networking.ServiceCIDRSpec{CIDRs: []string{"198.18.64.0/18"}}},
		service("web", "198.18.64.5", 30080), endpoints("web", "198.19.7.2"),
		service("nobody", "198.18.64.6", 30081), endpoints("nobody"))
	cfg := Config{
		NodeName: "node-1", NodeIP: netip.MustParseAddr("198.18.0.1"), ClusterCIDR: prefix("198.19.0.0/16"),
		Logger: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, cfg, client) }()

	eventually(t, "the node reaches a ClusterIP", func() bool { w, _ := read("198.18.64.5:80"); return w == "two" })
	if w, err := read("198.18.0.1:30080"); w != "two" {
		t.Errorf("NodePort: %q, %v", w, err)
	}
	if w, err := read("198.18.0.77:30080"); err == nil {
		t.Errorf("NodePort on an address that is not the node's: %q", w)
	}
	if w, err := read("198.18.64.6:80"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a Service without endpoints: %q, %v", w, err)
	}
	if _, err := client.DiscoveryV1().EndpointSlices("default").Update(t.Context(), endpoints("web", "198.19.7.3"), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a changed endpoint is followed", func() bool { w, _ := read("198.18.64.5:80"); return w == "three" })
	if err := client.CoreV1().Services("default").Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a deleted Service is gone", func() bool { _, err := read("198.18.64.5:80"); return err != nil })

	if out := ruleset(t); !strings.Contains(out, "table ip kube-proxy") || strings.Contains(out, "ip6") {
		t.Errorf("tables:\n%s", out)
	}
	cancel()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("Run ended with %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("Run did not end with its context")
	}
	if there, err := Present(t.Context()); !there || err != nil {
		t.Errorf("the table is there: %v, %v", there, err)
	}
	for range 2 {
		if err := Cleanup(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if there, err := Present(t.Context()); there || err != nil {
		t.Errorf("after Cleanup: %v, %v", there, err)
	}
	if out := ruleset(t); out != "" {
		t.Errorf("left behind:\n%s", out)
	}
}

func ruleset(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("nft", "list", "tables").CombinedOutput()
	if err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
	return string(out)
}

func TestConfigIsChecked(t *testing.T) {
	for _, cfg := range []Config{
		{}, {NodeName: "n"}, {NodeName: "n", NodeIP: netip.IPv6Loopback()},
		{NodeName: "n", NodeIP: netip.MustParseAddr("198.18.0.1"), ClusterCIDR: prefix("fd00::/64")},
	} {
		if err := Run(t.Context(), cfg); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
	cfg := Config{NodeName: "n", NodeIP: netip.MustParseAddr("198.18.0.1"), ClusterCIDR: prefix("198.19.0.0/16"), Kubeconfig: "/nonexistent"}
	if err := Run(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "/nonexistent") {
		t.Errorf("no kubeconfig: %v", err)
	}
}
