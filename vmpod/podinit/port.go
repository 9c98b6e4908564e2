package podinit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A port is a virtio-serial port used through the runtime's poller. Without a
// host the kernel lets reads return 0 and reports a hang-up; since the poller
// is edge-triggered, that costs one wake-up, and the next edge comes with the
// host.
type port struct {
	f   *os.File
	raw syscall.RawConn
}

// openPort waits for the port of the given name; its driver may still be
// asking the hypervisor.
func openPort(name string) (*port, error) {
	var dev string
	err := waitDevice(context.Background(), "virtio port "+name, time.Minute, func() (bool, error) {
		dev = findPort("/sys/class/virtio-ports", name)
		return dev != "", nil
	})
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile("/dev/"+dev, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("virtio port %s: %w", name, err)
	}
	return &port{f, raw}, nil
}

// findPort returns the device's name, empty if there is no such port.
func findPort(class, name string) string {
	files, _ := filepath.Glob(filepath.Join(class, "*/name"))
	for _, file := range files {
		if b, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(b)) == name {
			return filepath.Base(filepath.Dir(file))
		}
	}
	return ""
}

// Read blocks while there is no host.
func (p *port) Read(b []byte) (n int, err error) {
	rerr := p.raw.Read(func(fd uintptr) bool {
		n, err = ignoringEINTR(func() (int, error) { return unix.Read(int(fd), b) })
		return n > 0 || err != nil && !errors.Is(err, unix.EAGAIN)
	})
	return max(n, 0), errors.Join(err, rerr)
}

// Write blocks while there is no host, or while it does not read.
func (p *port) Write(b []byte) (int, error) {
	total := 0
	for total < len(b) {
		var n int
		var err error
		werr := p.raw.Write(func(fd uintptr) bool {
			n, err = ignoringEINTR(func() (int, error) { return unix.Write(int(fd), b[total:]) })
			return n > 0 || err != nil && !errors.Is(err, unix.EAGAIN)
		})
		if err = errors.Join(err, werr); err != nil {
			return total, err
		}
		total += n
	}
	return total, nil
}

func ignoringEINTR(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
