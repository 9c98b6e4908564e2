package dns

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/coredns/caddy/caddyfile"
)

func testConfig() Config {
	return Config{
		Listen:     netip.MustParseAddrPort("198.18.0.1:53"),
		Ready:      netip.MustParseAddrPort("127.0.0.1:10354"),
		Domain:     "cluster.local",
		Kubeconfig: "/d/pki/kubeconfig/coredns.kubeconfig",
	}
}

func TestCorefile(t *testing.T) {
	for name, tc := range map[string]struct {
		upstreams []netip.AddrPort
		keys      []string
		has, not  string
	}{
		"isolated":       {nil, []string{"cluster.local:53", "in-addr.arpa:53", "ip6.arpa:53", ".:53"}, "NXDOMAIN", "forward"},
		"with upstreams": {[]netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53"), netip.MustParseAddrPort("[2001:db8::1]:53")}, []string{".:53"}, "forward . 192.0.2.1:53 [2001:db8::1]:53", "NXDOMAIN"},
	} {
		c := testConfig()
		c.Upstreams = tc.upstreams
		text, err := c.Corefile()
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(text, tc.has) || strings.Contains(text, tc.not) {
			t.Errorf("%s:\n%s", name, text)
		}
		blocks, err := caddyfile.Parse("Corefile", strings.NewReader(text), nil)
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, text)
		}
		var keys []string
		for _, b := range blocks {
			keys = append(keys, b.Keys...)
			if b.Tokens["bind"] == nil {
				t.Errorf("%s: block %v listens everywhere", name, b.Keys)
			}
		}
		if strings.Join(keys, " ") != strings.Join(tc.keys, " ") {
			t.Errorf("%s: zones %v, want %v", name, keys, tc.keys)
		}
	}
}

func TestCorefileRefusesPathsItCannotHold(t *testing.T) {
	for _, path := range []string{"/a b", "/a\nforward . 192.0.2.9", "/a{", "/a\"", "/a#"} {
		c := testConfig()
		c.Kubeconfig = path
		if _, err := c.Corefile(); err == nil {
			t.Errorf("%q accepted", path)
		}
	}
}
