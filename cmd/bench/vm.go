package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"github.com/openatoll/atoll/vmpod/guestimage"
	"github.com/openatoll/atoll/vmpod/qemu"
)

// bootTimeout bounds one boot on a machine without KVM.
const bootTimeout = 90 * time.Second

// benchMemory is the RAM of every measured VM, in bytes: small, since clearing
// it is no part of what differs between a raw boot and ours.
const benchMemory = 256 << 20

// A vmBench measures machines below Kubernetes.
type vmBench struct {
	dir         string
	guest       guestimage.Guest
	driver      *qemu.Driver // boots each VM
	accelerator string
}

func newVMBench(dir, guest string) (*vmBench, error) {
	g, err := guestimage.Load(guest)
	if err != nil {
		return nil, err
	}
	b := &vmBench{dir: dir, guest: g}
	if b.driver, err = b.newDriver("", qemu.Templates{}); err != nil {
		return nil, err
	}
	accel, _ := b.driver.Accelerator()
	b.accelerator = string(accel)
	return b, nil
}

// newDriver makes a driver with directories of its own.
func (b *vmBench) newDriver(name string, templates qemu.Templates) (*qemu.Driver, error) {
	return qemu.New(qemu.Config{
		Guest:     qemu.Guest{Kernel: b.guest.Kernel, Initrd: b.guest.Initrd, Cmdline: b.guest.Cmdline},
		StateDir:  filepath.Join(b.dir, "vms"+name),
		RunDir:    filepath.Join(b.dir, "run"+name),
		Cgroup:    benchCgroup,
		Templates: templates,
		Logger:    slog.New(slog.DiscardHandler),
	})
}

// benchCgroup is where the measured VMs are accounted.
const benchCgroup = "atoll/bench"

// close lets go of the driver and removes the groups that it keeps for VMs to
// come; those of other clusters are not empty, and stay.
func (b *vmBench) close() {
	_ = b.driver.Close()
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		for group := benchCgroup; group != "."; group = filepath.Dir(group) {
			dirs, _ := filepath.Glob(filepath.Join(root, group))
			for _, dir := range dirs {
				_ = unix.Rmdir(dir)
			}
		}
	}
}

func (b *vmBench) spec() vmpod.Spec {
	id := uuid.NewString()
	return vmpod.Spec{
		ID:    vmpod.ID{PodUID: id},
		Owner: vmpod.Owner{PodUID: id, Namespace: "bench", Name: "bench"},
		CPUs:  1, Memory: benchMemory,
	}
}

// run takes raw boots and launches turn by turn.
func (b *vmBench) run(ctx context.Context, n int, all *results) error {
	var raw, launch []float64
	for i := range n + 1 {
		r, _, err := b.rawBoot(ctx)
		if err != nil {
			return fmt.Errorf("raw boot: %w", err)
		}
		l, _, _, err := b.launch(ctx, b.driver)
		if err != nil {
			return fmt.Errorf("launch: %w", err)
		}
		say("boot %d of %d: raw %.0f ms, launch %.0f ms", i, n, r, l)
		if i > 0 { // the first one fills the host's page cache
			raw, launch = append(raw, r), append(launch, l)
		}
	}
	all.add("raw_boot", "ms", raw)
	all.add("launch", "ms", launch).to(*all, "raw_boot", 1.25)
	return nil
}

// rawBoot runs QEMU by hand, with the command line that the driver would use,
// and returns the milliseconds from its exec to PID 1's first line on the
// console ("atoll.trace" makes podinit print it), and of its CPU time.
func (b *vmBench) rawBoot(ctx context.Context) (took, cpu float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	dir, err := os.MkdirTemp(b.dir, "raw")
	if err != nil {
		return 0, 0, err
	}
	defer os.RemoveAll(dir)
	argv, err := b.driver.RawCommand(b.spec(), dir)
	if err != nil {
		return 0, 0, err
	}
	for i, a := range argv {
		if a == "-append" {
			argv[i+1] += " atoll.trace"
		}
	}
	// The console waits for its reader, so that no line is lost.
	for i, a := range argv {
		if strings.Contains(a, "id=con,") {
			argv[i] = strings.Replace(a, "wait=off", "wait=on", 1)
		}
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stderr = &stderr
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, 0, err
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	con, err := dial(ctx, filepath.Join(dir, "con"))
	if err != nil {
		return 0, 0, fmt.Errorf("%w: %s", err, stderr.String())
	}
	defer con.Close()
	if err := awaitText(ctx, con, "podinit started"); err != nil {
		return 0, 0, err
	}
	took = ms(start)
	cpu, err = runTime(cmd.Process.Pid)
	return took, cpu, err
}

// dial connects to a socket that is about to appear.
func dial(ctx context.Context, path string) (net.Conn, error) {
	for {
		c, err := net.Dial("unix", path)
		if err == nil {
			return c, nil
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(time.Millisecond):
		}
	}
}

func awaitText(ctx context.Context, c net.Conn, text string) error {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	var seen []byte
	buf := make([]byte, 4096)
	for {
		n, err := c.Read(buf)
		seen = append(seen, buf[:n]...)
		if bytes.Contains(seen, []byte(text)) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("console ended (%w) before %q; it said:\n%s", err, text, seen)
		}
	}
}

// launch returns the milliseconds from Launch to the agent's answer, and of
// QEMU's CPU time, and how the VM came to be.
func (b *vmBench) launch(ctx context.Context, driver *qemu.Driver) (took, cpu float64, origin vmpod.Origin, err error) {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	start := time.Now()
	m, err := driver.Launch(ctx, b.spec())
	if err != nil {
		return 0, 0, origin, err
	}
	defer func() { _ = m.Remove(context.WithoutCancel(ctx)) }()
	c, err := attach(ctx, m)
	if err != nil {
		return 0, 0, origin, err
	}
	took = ms(start)
	if o, ok := m.(vmpod.Originator); ok {
		origin = o.Origin()
	}
	status, err := m.Status(ctx)
	if err == nil {
		cpu, err = runTime(status.PID)
	}
	return took, cpu, origin, errors.Join(err, c.Close())
}

func attach(ctx context.Context, m vmpod.Machine) (io.Closer, error) {
	conn, err := m.Dial(ctx)
	if err != nil {
		return nil, err
	}
	c, err := agentapi.Attach(ctx, conn)
	if err != nil {
		conn.Close()
		return nil, err
	}
	if _, err := c.Hello(ctx, &agentapi.HelloRequest{HostVersion: "bench"}); err != nil {
		return nil, err
	}
	return c, nil
}

func ms(since time.Time) float64 { return float64(time.Since(since).Microseconds()) / 1000 }
