package qemu

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
)

func TestUserTable(t *testing.T) {
	id := func(i int) vmpod.ID { return vmpod.ID{PodUID: fmt.Sprintf("pod-%d", i)} }
	users := newUserTable(1000, 50)
	users.hold(id(100), 1007) // adopted
	seen := map[uint32]bool{1007: true}
	for i := range 49 {
		uid, err := users.claim(id(i))
		if err != nil || uid < 1000 || uid >= 1050 || seen[uid] {
			t.Fatalf("VM %d: user %d, %v", i, uid, err)
		}
		seen[uid] = true
	}
	if _, err := users.claim(id(200)); !errdefs.IsResourceExhausted(err) {
		t.Errorf("a 51st VM: %v", err)
	}
	users.release(id(100))
	users.release(id(100))
	if uid, err := users.claim(id(200)); uid != 1007 || err != nil {
		t.Errorf("after a VM has gone: %d, %v", uid, err)
	}
	one := newUserTable(1000, 0)
	for i := range 3 {
		if uid, err := one.claim(id(i)); uid != 1000 || err != nil {
			t.Errorf("one user for all: %d, %v", uid, err)
		}
	}
}

func TestNowhere(t *testing.T) {
	n := newNowhere()
	defer n.close()
	if errors.Is(n.err, unix.EPERM) {
		t.Skip("needs root: it makes a network namespace")
	}
	if n.err != nil {
		t.Fatal(n.err)
	}
	here, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		there := ""
		err := n.do(func() (err error) {
			there, err = os.Readlink("/proc/thread-self/ns/net")
			return err
		})
		if err != nil || there == here {
			t.Errorf("network namespace %q, ours is %q, %v", there, here, err)
		}
	}
	n.close()
	if err := n.do(func() error { return nil }); !errdefs.IsUnavailable(err) {
		t.Errorf("after close: %v", err)
	}
}
