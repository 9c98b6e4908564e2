package ipam

import (
	"net/netip"
	"testing"

	"github.com/containerd/errdefs"
)

func TestNext(t *testing.T) {
	for _, c := range []struct{ prefix, last, used, want string }{
		{"198.19.3.0/24", "", "", "198.19.3.2"},
		{"198.19.3.77/24", "", "", "198.19.3.2"}, // host bits do not matter
		{"198.19.3.0/24", "198.19.3.2", "", "198.19.3.3"},
		{"198.19.3.0/24", "198.19.3.254", "", "198.19.3.2"},
		{"198.19.3.0/24", "198.19.4.9", "", "198.19.3.2"}, // of another range
		{"198.19.3.0/24", "198.19.3.2", "198.19.3.3", "198.19.3.4"},
		{"198.19.3.0/24", "198.19.3.253", "198.19.3.254", "198.19.3.2"},
		{"198.19.3.0/30", "198.19.3.2", "", "198.19.3.2"}, // the only one
		{"fd00::/64", "", "", "fd00::2"},
		{"fd00::/126", "fd00::2", "", "fd00::3"}, // no broadcast address
	} {
		var last netip.Addr
		if c.last != "" {
			last = netip.MustParseAddr(c.last)
		}
		got, err := Next(netip.MustParsePrefix(c.prefix), last, func(a netip.Addr) bool { return a.String() == c.used })
		if err != nil || got.String() != c.want {
			t.Errorf("%+v: got %v, %v", c, got, err)
		}
	}
}

func TestNextHandsOutEveryAddressOnce(t *testing.T) {
	prefix := netip.MustParsePrefix("10.0.0.0/27")
	used := map[netip.Addr]bool{}
	var last netip.Addr
	for range 29 {
		a, err := Next(prefix, last, func(a netip.Addr) bool { return used[a] })
		if err != nil || used[a] || !prefix.Contains(a) {
			t.Fatalf("got %v, %v after %d", a, err, len(used))
		}
		used[a], last = true, a
	}
	for _, never := range []string{"10.0.0.0", "10.0.0.1", "10.0.0.31"} {
		if used[netip.MustParseAddr(never)] {
			t.Errorf("%s was handed out", never)
		}
	}
	if _, err := Next(prefix, last, func(a netip.Addr) bool { return used[a] }); !errdefs.IsResourceExhausted(err) {
		t.Errorf("full: %v", err)
	}
	// A released address is not given again while others are free.
	delete(used, last)
	delete(used, netip.MustParseAddr("10.0.0.5"))
	if a, err := Next(prefix, last, func(a netip.Addr) bool { return used[a] }); err != nil || a.String() != "10.0.0.5" {
		t.Errorf("got %v, %v", a, err)
	}
}

func TestPrefixesWithoutAddresses(t *testing.T) {
	for _, p := range []netip.Prefix{{}, netip.MustParsePrefix("10.0.0.0/31"), netip.MustParsePrefix("10.0.0.1/32"), netip.MustParsePrefix("fd00::/127")} {
		if err := Check(p); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", p, err)
		}
		if _, err := Next(p, netip.Addr{}, func(netip.Addr) bool { return false }); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", p, err)
		}
	}
}
