package qemu

import (
	"os"
	"runtime"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// testTap puts the test's goroutine into a network namespace of its own, which
// ends with the test, and makes a persistent tap there.
func testTap(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	// The thread is never unlocked, so the runtime discards it, and the
	// namespace with it.
	runtime.LockOSThread()
	ns, err := netns.New()
	if err != nil {
		t.Skipf("cannot make a network namespace: %v", err)
	}
	ns.Close()
	const name = "atltest0"
	tap := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP}
	if err := netlink.LinkAdd(tap); err != nil {
		t.Skipf("cannot make a tap: %v", err)
	}
	return name
}

func TestOpenTap(t *testing.T) {
	name := testTap(t)
	f, err := openTap(name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openTap(name); !errdefs.IsUnavailable(err) {
		t.Errorf("open a tap that is in use: %v, want Unavailable", err)
	}
	f.Close()
	if _, err := openTap("atlnone"); !errdefs.IsNotFound(err) {
		t.Errorf("open a tap that is not there: %v, want NotFound", err)
	}
	if _, err := netlink.LinkByName("atlnone"); err == nil {
		t.Error("a tap was made by opening it")
	}
}
