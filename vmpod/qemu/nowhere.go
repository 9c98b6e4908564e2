package qemu

import (
	"fmt"
	"os"
	"runtime"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// A nowhere is a thread in an empty network namespace, from which QEMUs are
// started. All that they need of the network are descriptors, which stay what
// they are: taps, unix sockets. What a guest that has taken over its QEMU could
// still reach otherwise is all that the host can: what listens on its loopback
// trusts that no stranger is there.
type nowhere struct {
	work chan func()
	gone chan struct{}
	once sync.Once
	err  error // the namespace could not be made: the thread is where we are
}

func newNowhere() *nowhere {
	n := &nowhere{work: make(chan func()), gone: make(chan struct{})}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this
		ready <- os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_NEWNET))
		for {
			select {
			case f := <-n.work:
				f()
			case <-n.gone:
				return
			}
		}
	}()
	n.err = <-ready
	return n
}

// do runs f on the thread; after close it is ErrUnavailable.
func (n *nowhere) do(f func() error) error {
	done := make(chan error, 1)
	select {
	case n.work <- func() { done <- f() }:
		return <-done
	case <-n.gone:
		return fmt.Errorf("the QEMU driver is closed: %w", errdefs.ErrUnavailable)
	}
}

func (n *nowhere) close() { n.once.Do(func() { close(n.gone) }) }
