package controlplane

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// maxUpstreams is what CoreDNS' forward accepts at most.
const maxUpstreams = 15

// HostResolvers returns the name servers of a resolv.conf file that DNS may
// forward to: those on loopback (a local stub that other hosts cannot be
// assumed to reach, or this DNS itself), link-local and unspecified ones are
// left out. A file without any gives an empty list and no error.
func HostResolvers(file string) ([]string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("host's resolvers: %w", err)
	}
	var servers []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		a, err := netip.ParseAddr(f[1])
		if err != nil || a.IsLoopback() || a.IsUnspecified() || a.IsLinkLocalUnicast() || a.IsMulticast() {
			continue
		}
		if s := a.String(); !slices.Contains(servers, s) && len(servers) < maxUpstreams {
			servers = append(servers, s)
		}
	}
	return servers, nil
}
