// Package netplugintest judges implementations of netplugin.Network.
package netplugintest

import (
	"context"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/netplugin"
)

// CIDR is the range that the suite configures: five addresses for pods.
var CIDR = netip.MustParsePrefix("198.19.7.0/29")

const capacity = 5

// Run runs the suite. setup prepares an empty place, registers its cleaning,
// and returns a function that opens the Network there: each call is a restart,
// a new instance that knows only what the earlier ones left behind. left, also
// from setup, returns what is in the kernel and on disk for the Network, to
// compare before and after; it may be nil.
func Run(t *testing.T, setup func(t *testing.T) (open func() netplugin.Network, left func() []string)) {
	for _, c := range []struct {
		name string
		run  func(t *testing.T, s *suite)
	}{
		{"NotReadyBeforeConfigure", testNotReady},
		{"Configure", testConfigure},
		{"AttachIsIdempotent", testAttachIdempotent},
		{"DetachIsIdempotent", testDetachIdempotent},
		{"AttachmentsDiffer", testDiffer},
		{"Exhaustion", testExhaustion},
		{"AddressesRest", testAddressesRest},
		{"HostPorts", testHostPorts},
		{"InvalidRequests", testInvalid},
		{"ListAfterRestart", testRestart},
		{"Concurrency", testConcurrency},
		{"FailureLeavesNothing", testFailure},
	} {
		t.Run(c.name, func(t *testing.T) {
			open, left := setup(t)
			c.run(t, &suite{open: open, left: left})
		})
	}
}

type suite struct {
	open func() netplugin.Network
	left func() []string
}

func (s *suite) configured(t *testing.T) netplugin.Network {
	t.Helper()
	n := s.open()
	if err := n.Configure(t.Context(), []netip.Prefix{CIDR}); err != nil {
		t.Fatal(err)
	}
	return n
}

func request(key string) netplugin.Request {
	return netplugin.Request{Key: key, Namespace: "default", Name: "pod-" + key}
}

func attach(t *testing.T, n netplugin.Network, req netplugin.Request) netplugin.Attachment {
	t.Helper()
	a, err := n.Attach(t.Context(), req)
	if err != nil {
		t.Fatalf("attach %s: %v", req.Key, err)
	}
	return a
}

func detach(t *testing.T, n netplugin.Network, key string) {
	t.Helper()
	if err := n.Detach(t.Context(), key); err != nil {
		t.Fatalf("detach %s: %v", key, err)
	}
}

// listed compares List with the attachments expected, in any order.
func listed(t *testing.T, n netplugin.Network, want ...netplugin.Attachment) {
	t.Helper()
	got, err := n.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	less := func(a, b netplugin.Attachment) int {
		if a.Key < b.Key {
			return -1
		}
		return 1
	}
	slices.SortFunc(got, less)
	want = slices.Clone(want)
	slices.SortFunc(want, less)
	if len(got) != len(want) || (len(got) > 0 && !reflect.DeepEqual(got, want)) {
		t.Errorf("List is\n%+v\nwant\n%+v", got, want)
	}
}

func testNotReady(t *testing.T, s *suite) {
	n := s.open()
	if err := n.Ready(t.Context()); err == nil {
		t.Error("ready without a range")
	}
	if _, err := n.Attach(t.Context(), request("a")); !errdefs.IsUnavailable(err) {
		t.Errorf("attach without a range: %v", err)
	}
	if err := n.Configure(t.Context(), []netip.Prefix{CIDR}); err != nil {
		t.Fatal(err)
	}
	if err := n.Ready(t.Context()); err != nil {
		t.Errorf("not ready: %v", err)
	}
	attach(t, n, request("a"))
}

func testConfigure(t *testing.T, s *suite) {
	n := s.configured(t)
	other := netip.MustParsePrefix("198.19.9.0/24")
	for _, bad := range [][]netip.Prefix{nil, {{}}, {netip.MustParsePrefix("198.19.7.1/32")}} {
		if err := n.Configure(t.Context(), bad); err == nil {
			t.Errorf("%v was accepted", bad)
		}
	}
	a := attach(t, n, request("a"))
	if err := n.Configure(t.Context(), []netip.Prefix{CIDR}); err != nil {
		t.Errorf("the same range again: %v", err)
	}
	if err := n.Configure(t.Context(), []netip.Prefix{other}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another range while attached: %v", err)
	}
	n = s.open()
	if err := n.Configure(t.Context(), []netip.Prefix{other}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another range while attached, after a restart: %v", err)
	}
	detach(t, n, a.Key)
	if err := n.Configure(t.Context(), []netip.Prefix{other}); err != nil {
		t.Errorf("another range once empty: %v", err)
	}
	if b := attach(t, n, request("b")); !other.Contains(b.Addresses[0].Addr()) {
		t.Errorf("%v is not of %v", b.Addresses, other)
	}
}

func testAttachIdempotent(t *testing.T, s *suite) {
	n := s.configured(t)
	first := attach(t, n, request("a"))
	if first.Key != "a" || first.Tap == "" || len(first.MAC) != 6 || first.MAC[0]&3 != 2 || first.MTU < 576 || len(first.Addresses) == 0 || len(first.Routes) == 0 {
		t.Errorf("incomplete: %+v", first)
	}
	if !CIDR.Contains(first.Addresses[0].Addr()) {
		t.Errorf("%v is not of %v", first.Addresses, CIDR)
	}
	if again := attach(t, n, request("a")); !reflect.DeepEqual(first, again) {
		t.Errorf("got %+v, then %+v", first, again)
	}
	if again := attach(t, s.configured(t), request("a")); !reflect.DeepEqual(first, again) {
		t.Errorf("got %+v, after a restart %+v", first, again)
	}
	listed(t, n, first)
}

func testDetachIdempotent(t *testing.T, s *suite) {
	n := s.configured(t)
	detach(t, n, "never there")
	attach(t, n, request("a"))
	b := attach(t, n, request("b"))
	detach(t, n, "a")
	detach(t, n, "a")
	listed(t, n, b)
	// A restart may come before the range is known again.
	n = s.open()
	detach(t, n, "b")
	listed(t, n)
	detach(t, s.open(), "b")
}

func testDiffer(t *testing.T, s *suite) {
	n := s.configured(t)
	a, b := attach(t, n, request("uid_0")), attach(t, n, request("uid_1"))
	if a.Tap == b.Tap || a.MAC.String() == b.MAC.String() || a.Addresses[0] == b.Addresses[0] {
		t.Errorf("two attachments share something:\n%+v\n%+v", a, b)
	}
	listed(t, n, a, b)
}

func testExhaustion(t *testing.T, s *suite) {
	n := s.configured(t)
	seen := map[netip.Prefix]bool{}
	for i := range capacity {
		a := attach(t, n, request(fmt.Sprint(i)))
		if seen[a.Addresses[0]] {
			t.Errorf("%v twice", a.Addresses)
		}
		seen[a.Addresses[0]] = true
	}
	if _, err := n.Attach(t.Context(), request("one more")); !errdefs.IsResourceExhausted(err) {
		t.Errorf("one too many: %v", err)
	}
	attach(t, n, request("0")) // what is there still answers
	detach(t, n, "3")
	attach(t, n, request("one more"))
}

func testAddressesRest(t *testing.T, s *suite) {
	n := s.configured(t)
	a := attach(t, n, request("a"))
	attach(t, n, request("keeps the count over a restart"))
	detach(t, n, "a")
	n = s.configured(t)
	if b := attach(t, n, request("b")); b.Addresses[0] == a.Addresses[0] {
		t.Errorf("%v was given again at once", a.Addresses)
	}
}

func testHostPorts(t *testing.T, s *suite) {
	n := s.configured(t)
	port := func(proto, ip string, host uint16) netplugin.HostPort {
		p := netplugin.HostPort{Protocol: proto, HostPort: host, ContainerPort: 80}
		if ip != "" {
			p.HostIP = netip.MustParseAddr(ip)
		}
		return p
	}
	req := func(key string, ports ...netplugin.HostPort) netplugin.Request {
		r := request(key)
		r.HostPorts = ports
		return r
	}
	a := attach(t, n, req("a", port("tcp", "", 8080), port("udp", "198.18.0.1", 53)))
	if len(a.HostPorts) != 2 {
		t.Errorf("host ports of %+v", a)
	}
	for _, taken := range []netplugin.HostPort{port("tcp", "", 8080), port("tcp", "0.0.0.0", 8080), port("tcp", "198.18.0.1", 8080), port("udp", "", 53)} {
		if _, err := n.Attach(t.Context(), req("b", taken)); !errdefs.IsAlreadyExists(err) {
			t.Errorf("%+v: %v", taken, err)
		}
	}
	b := attach(t, n, req("b", port("udp", "", 8080), port("udp", "198.18.0.9", 53), port("sctp", "", 8080)))
	listed(t, s.open(), a, b)
	detach(t, n, "a")
	attach(t, n, req("c", port("tcp", "", 8080)))
	for _, bad := range [][]netplugin.HostPort{
		{port("icmp", "", 1)}, {port("tcp", "", 0)}, {port("tcp", "::1", 1)}, {port("tcp", "", 9), port("tcp", "198.18.0.1", 9)},
		{{Protocol: "tcp", HostPort: 9}},
	} {
		if _, err := n.Attach(t.Context(), req("d", bad...)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

func testInvalid(t *testing.T, s *suite) {
	n := s.configured(t)
	if _, err := n.Attach(t.Context(), netplugin.Request{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an empty key: %v", err)
	}
	// Keys and names come from outside: none of them may be taken for a path
	// or a command.
	for _, key := range []string{"../../etc/passwd", "a b\n{ }; drop", "ключ"} {
		a := attach(t, n, netplugin.Request{Key: key, Namespace: "x\ny", Name: "$(id) \" '"})
		listed(t, s.open(), a)
		detach(t, n, key)
	}
	listed(t, n)
}

func testRestart(t *testing.T, s *suite) {
	n := s.configured(t)
	a, b := attach(t, n, request("a")), attach(t, n, request("b"))
	n = s.open()
	listed(t, n, a, b) // before the range is known again
	if err := n.Configure(t.Context(), []netip.Prefix{CIDR}); err != nil {
		t.Fatal(err)
	}
	c := attach(t, n, request("c"))
	if c.Addresses[0] == a.Addresses[0] || c.Addresses[0] == b.Addresses[0] {
		t.Errorf("%v is in use", c.Addresses)
	}
	detach(t, n, "a")
	listed(t, s.open(), b, c)
}

func testConcurrency(t *testing.T, s *suite) {
	n := s.configured(t)
	var wg sync.WaitGroup
	results := make([]netplugin.Attachment, 4*capacity)
	for i := range results {
		wg.Go(func() {
			a, err := n.Attach(t.Context(), request(fmt.Sprint(i%capacity)))
			if err != nil {
				t.Error(err)
			}
			results[i] = a
		})
	}
	wg.Wait()
	for i, a := range results {
		if !reflect.DeepEqual(a, results[i%capacity]) {
			t.Errorf("key %d: %+v and %+v", i%capacity, a, results[i%capacity])
		}
	}
	listed(t, s.open(), results[:capacity]...)
	for i := range results {
		wg.Go(func() {
			if err := n.Detach(t.Context(), fmt.Sprint(i%capacity)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	listed(t, n)
}

func testFailure(t *testing.T, s *suite) {
	n := s.configured(t)
	a := attach(t, n, request("a"))
	var before []string
	if s.left != nil {
		before = s.left()
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := n.Attach(ctx, request("b")); err == nil {
		t.Fatal("an ended context was ignored")
	}
	listed(t, n, a)
	listed(t, s.open(), a)
	if s.left != nil {
		if after := s.left(); !slices.Equal(before, after) {
			t.Errorf("a failed attach changed\n%q\nto\n%q", before, after)
		}
	}
	attach(t, n, request("b"))
	detach(t, n, "b")
	detach(t, n, "a")
}
