package cluster

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/net/dns/dnsmessage"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/openatoll/atoll/api/v1alpha1"
)

func TestNodeName(t *testing.T) {
	for host, want := range map[string]string{"Host1": "host1", "a.b.example": "a.b.example", "localhost": "", "localhost.localdomain": "", "": "", "under_score": ""} {
		got, err := nodeName(host)
		if got != want || (want == "") != errdefs.IsFailedPrecondition(err) {
			t.Errorf("nodeName(%q) = %q, %v; want %q", host, got, err, want)
		}
	}
}

func TestSphereletConfigIsStrictYAML(t *testing.T) {
	l := layout(t)
	s := State{Isolated: true, Node: "n1"}
	if err := writeSphereletConfig(l, s, Assets{Guest: "/guest"}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(l.SphereletConfig("n1"))
	if err != nil {
		t.Fatal(err)
	}
	var c v1alpha1.SphereletConfiguration
	if err := yaml.UnmarshalStrict(b, &c); err != nil {
		t.Fatal(err)
	}
	if c.Kind != v1alpha1.SphereletKind || c.NodeName != "n1" || c.NodeIP != "198.18.0.1" || c.NetworkNamespace != l.NetnsPath() || c.Hypervisor.Guest != "/guest" {
		t.Errorf("configuration: %+v", c)
	}
	if *c.Images.GCHighThresholdPercent != 100 || strings.HasSuffix(c.EvictionHard["imagefs.available"], "%") {
		t.Errorf("images %+v and eviction %v go by how full the host's disk is", c.Images, c.EvictionHard)
	}
	if st, _ := os.Stat(l.SphereletConfig("n1")); st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}
}

func TestTellingLines(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	old := "E1121 10:00:00.0 1 x.go:1] an error of the run before\n"
	content := old + "level=INFO msg=fine\nlevel=ERROR msg=\"no kernel\"\nI1121 10:00:00.0 1 x.go:1] fine\nE1121 10:00:00.0 1 x.go:1] port taken\nlevel=INFO msg=bye\n"
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	got := tellingLines(file, int64(len(old)), 5)
	if want := []string{`level=ERROR msg="no kernel"`, "E1121 10:00:00.0 1 x.go:1] port taken"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	// Without an error, what it said last.
	got = tellingLines(file, int64(len(content)-len("level=INFO msg=bye\n")), 5)
	if want := []string{"level=INFO msg=bye"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestChooseState(t *testing.T) {
	l := layout(t)
	yes, no := true, false
	s, err := chooseState(l, Options{Node: "n1", Isolated: &yes})
	if err != nil || s.Node != "n1" || !s.Isolated {
		t.Fatalf("first: %+v, %v", s, err)
	}
	if _, err := chooseState(l, Options{Node: "Bad_Name"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("bad name: %v", err)
	}
	if err := WriteState(l, s); err != nil {
		t.Fatal(err)
	}
	if s, err := chooseState(l, Options{}); err != nil || s.Node != "n1" || !s.Isolated {
		t.Errorf("as recorded: %+v, %v", s, err)
	}
	if s, err := chooseState(l, Options{Isolated: &no}); err != nil || s.Isolated {
		t.Errorf("another isolation while it is down: %+v, %v", s, err)
	}
	if _, err := chooseState(l, Options{Node: "n2"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another node: %v", err)
	}
}

func TestPurgeErasesOnlyWhatIsAtolls(t *testing.T) {
	l := layout(t)
	precious := filepath.Join(l.DataDir(), "precious")
	if err := os.MkdirAll(precious, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Down(t.Context(), l, DownOptions{Purge: true}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("purge of a foreign directory: %v", err)
	}
	if _, err := os.Stat(precious); err != nil {
		t.Fatal(err)
	}
	if err := WriteState(l, State{Isolated: true, Node: "n"}); err != nil {
		t.Fatal(err)
	}
	if err := Down(t.Context(), l, DownOptions{}); err != nil {
		t.Errorf("down: %v", err)
	}
	if _, err := os.Stat(precious); err != nil {
		t.Errorf("down without --purge: %v", err)
	}
	for range 2 { // also when it is gone
		if err := Down(t.Context(), l, DownOptions{Purge: true}); err != nil {
			t.Errorf("purge: %v", err)
		}
	}
	if _, err := os.Stat(l.DataDir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after the purge: %v", err)
	}
}

func TestNodeReady(t *testing.T) {
	now := time.Now()
	node := func(status corev1.ConditionStatus, heartbeat time.Time) *corev1.Node {
		return &corev1.Node{Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{
			Type: corev1.NodeReady, Status: status, Reason: "R", Message: "m", LastHeartbeatTime: metav1.NewTime(heartbeat.Truncate(time.Second)),
		}}}}
	}
	for name, tc := range map[string]struct {
		node *corev1.Node
		want string
	}{
		"ready":      {node(corev1.ConditionTrue, now), ""},
		"not ready":  {node(corev1.ConditionFalse, now), "R: m"},
		"of the old": {node(corev1.ConditionTrue, now.Add(-time.Minute)), "not reported since"},
		"silent":     {&corev1.Node{}, "not reported its condition"},
	} {
		err := nodeReady(tc.node, now)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

// dnsServer answers every question in the same way.
func dnsServer(t *testing.T, rcode dnsmessage.RCode, answers int) netip.AddrPort {
	t.Helper()
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		buf := make([]byte, 512)
		for {
			n, from, err := conn.ReadFromUDP(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil {
				continue
			}
			m.Response, m.RCode = true, rcode
			for range answers {
				m.Answers = append(m.Answers, dnsmessage.Resource{
					Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET},
					Body:   &dnsmessage.AResource{A: [4]byte{192, 0, 2, 1}},
				})
			}
			out, err := m.Pack()
			if err == nil {
				_, _ = conn.WriteToUDP(out, from)
			}
		}
	}()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

func TestLookup(t *testing.T) {
	var d net.Dialer
	for name, tc := range map[string]struct {
		rcode   dnsmessage.RCode
		answers int
		ok      bool
	}{
		"answer":    {dnsmessage.RCodeSuccess, 1, true},
		"no answer": {dnsmessage.RCodeSuccess, 0, false},
		"refused":   {dnsmessage.RCodeServerFailure, 0, false},
	} {
		err := lookup(t.Context(), d.DialContext, dnsServer(t, tc.rcode, tc.answers), "kubernetes.default.svc.cluster.local.")
		if (err == nil) != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestUntilReturnsTheLastError(t *testing.T) {
	n := 0
	err := until(t.Context(), 50*time.Millisecond, time.Millisecond, func(context.Context) error { n++; return errors.New("not yet") })
	if n < 2 || err == nil || !strings.Contains(err.Error(), "not yet") {
		t.Errorf("after %d calls: %v", n, err)
	}
}

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"runs": 0o755, "plain": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	path := "/nowhere:" + dir
	if got, err := lookPath("runs", path); err != nil || got != filepath.Join(dir, "runs") {
		t.Errorf("runs: %q, %v", got, err)
	}
	if got, err := lookPath("./x/y", path); err != nil || got != "./x/y" {
		t.Errorf("a path: %q, %v", got, err)
	}
	for _, name := range []string{"plain", "missing"} {
		if _, err := lookPath(name, path); !errors.Is(err, exec.ErrNotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSetenv(t *testing.T) {
	got := setenv([]string{"A=1", "PATH=/bin", "KUBECONFIG=/x"}, map[string]string{"KUBECONFIG": "/y"})
	if want := []string{"A=1", "PATH=/bin", "KUBECONFIG=/y"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestAssetsBeside(t *testing.T) {
	root := t.TempDir()
	bin := filepath.Join(root, "bin")
	for _, dir := range []string{"bin", "build/images", "lib/atoll/guest"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	a, err := assetsBeside(bin, "")
	if err != nil || a.Images != filepath.Join(root, "build/images") || a.Guest != filepath.Join(root, "lib/atoll/guest") || a.Spherelet() != filepath.Join(bin, "spherelet") {
		t.Errorf("%+v, %v", a, err)
	}
	if a, err := assetsBeside(bin, "/g"); err != nil || a.Guest != "/g" {
		t.Errorf("explicit guest: %+v, %v", a, err)
	}
}
