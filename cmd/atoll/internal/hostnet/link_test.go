package hostnet

import (
	"net"
	"net/netip"
	"testing"

	"github.com/containerd/errdefs"
)

func TestLink(t *testing.T) {
	needRoot(t)
	addr := netip.MustParsePrefix("198.18.0.1/18")
	err := Scratch(func() error {
		for i, want := range []bool{true, false} {
			if made, err := EnsureLink("atoll0", "me", addr); err != nil || made != want {
				t.Errorf("EnsureLink #%d = %v, %v; want %v", i+1, made, err, want)
			}
		}
		l, err := net.Listen("tcp4", "198.18.0.1:0")
		if err != nil {
			t.Errorf("the address is not usable: %v", err)
		} else {
			l.Close()
		}
		if _, err := EnsureLink("atoll0", "other", addr); !errdefs.IsAlreadyExists(err) {
			t.Errorf("another owner's link: %v", err)
		}
		if err := RemoveLink("atoll0", "other"); err != nil {
			t.Errorf("RemoveLink by another: %v", err)
		}
		if _, err := net.InterfaceByName("atoll0"); err != nil {
			t.Errorf("removed by another: %v", err)
		}
		for range 2 {
			if err := RemoveLink("atoll0", "me"); err != nil {
				t.Error(err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
