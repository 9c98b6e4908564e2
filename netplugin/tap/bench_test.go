package tap

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/openatoll/atoll/netplugin"
	"github.com/openatoll/atoll/netplugin/netplugintest"
)

// BenchmarkAttach is one Attach and one Detach beside 100 other pods.
func BenchmarkAttach(b *testing.B) {
	netplugintest.Isolated(b)
	if err := EnsureNodeLink(b.Context(), "atoll0", []netip.Prefix{netip.PrefixFrom(nodeIP, 32)}); err != nil {
		b.Fatal(err)
	}
	n, err := New(Config{StateDir: b.TempDir(), NodeIP: nodeIP})
	if err != nil {
		b.Fatal(err)
	}
	defer n.Close()
	if err := n.Configure(b.Context(), []netip.Prefix{netip.MustParsePrefix("198.19.7.0/24")}); err != nil {
		b.Fatal(err)
	}
	one := func(key string) {
		if _, err := n.Attach(b.Context(), netplugin.Request{Key: key}); err != nil {
			b.Fatal(err)
		}
	}
	for i := range 100 {
		one(fmt.Sprint(i))
	}
	for i := 0; b.Loop(); i++ {
		key := fmt.Sprintf("new-%d", i)
		one(key)
		if err := n.Detach(b.Context(), key); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	if err := Cleanup(b.Context(), n.cfg); err != nil {
		b.Fatal(err)
	}
	if err := RemoveNodeLink(b.Context(), "atoll0"); err != nil {
		b.Fatal(err)
	}
}
