package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod"
)

// shareEntry is a share in the device table.
type shareEntry struct {
	vmpod.Share
	Slot int `json:"slot"` // on plugBus
	// Server is the virtiofsd that serves it, nil before it was started.
	Server *process `json:"server,omitempty"`
}

func shareName(id string) string { return "share-" + id }

// shareSocket is the extension of the socket over which a server and QEMU are
// brought together; its name lasts for that moment only.
const shareSocket = "share"

// sharesDir in a VM's directory holds, for every share, the place where its
// server mounts it, in a mount namespace that nobody else sees.
const sharesDir = "shares"

// sharesMemory says whether VMs launched now can have shares: their RAM must
// then be memory that the servers can map.
func (d *Driver) sharesMemory() bool { return len(d.cfg.HostDirectories) > 0 }

func checkShare(s vmpod.Share) error {
	switch {
	case !deviceIDRE.MatchString(s.ID):
		return fmt.Errorf("share ID %q: want 1 to 20 characters of [a-z0-9-]", s.ID)
	case !filepath.IsAbs(s.Path) || filepath.Clean(s.Path) != s.Path:
		return fmt.Errorf("share %s: path %q: want an absolute and clean one", s.ID, s.Path)
	case s.RecursiveReadOnly && !s.ReadOnly:
		return fmt.Errorf("share %s: recursively read-only, but not read-only", s.ID)
	}
	return nil
}

// permit holds a share against what the operator allows and returns the
// allowed directory that it is in.
func (m *Machine) permit(s vmpod.Share) (vmpod.HostDirectory, error) {
	dir, ok := vmpod.FindHostDirectory(m.d.cfg.HostDirectories, s.Path)
	switch {
	case !ok:
		return dir, fmt.Errorf("%s is in no host directory that pods may use: %w", s.Path, errdefs.ErrPermissionDenied)
	case dir.ReadOnly && !(s.ReadOnly && s.RecursiveReadOnly):
		return dir, fmt.Errorf("%s is in %s, which pods may only read: %w", s.Path, dir.Path, errdefs.ErrPermissionDenied)
	case dir.ReadOnly && s.Follow:
		return dir, fmt.Errorf("%s is in %s, which pods may only read, and mounts that come later could not be kept read-only: %w", s.Path, dir.Path, errdefs.ErrPermissionDenied)
	case !m.proc.SharedMemory:
		return dir, fmt.Errorf("the pod VM was launched when pods could use no host directories: make the pod anew: %w", errdefs.ErrFailedPrecondition)
	}
	return dir, nil
}

// addShare starts the server of a share, which the table already has, and
// connects QEMU with it. From then on the server lives as long as its
// connection: it ends with QEMU, or when the device is gone. Before, the
// connection is ours, so that it ends with us.
func (m *Machine) addShare(ctx context.Context, q *qmpConn, s vmpod.Share, slot int) error {
	dir, err := m.permit(s)
	if err != nil {
		return err
	}
	conn, err := m.serveShare(s, dir)
	if err != nil {
		return err
	}
	defer conn.Close()
	name := shareName(s.ID)
	if err := q.run(ctx, "getfd", map[string]any{"fdname": name}, nil, conn); err != nil {
		return err
	}
	err = q.run(ctx, "chardev-add", map[string]any{"id": name, "backend": map[string]any{
		"type": "socket",
		"data": map[string]any{"addr": map[string]any{"type": "fd", "data": map[string]any{"str": name}}, "server": false},
	}}, nil)
	if err != nil {
		_ = q.run(ctx, "closefd", map[string]any{"fdname": name}, nil)
		return err
	}
	return q.run(ctx, "device_add", shareDevice(s, slot), nil)
}

// shareDevice is the device of a share for device_add.
func shareDevice(s vmpod.Share, slot int) map[string]any {
	return map[string]any{
		"driver":  "vhost-user-fs-pci",
		"id":      shareName(s.ID),
		"chardev": shareName(s.ID),
		"tag":     s.ID,
		"bus":     plugBus,
		"addr":    plugAddress(slot),
	}
}

// serveShare starts a share's server and records it. What it returns is the
// other end of the server's connection.
func (m *Machine) serveShare(s vmpod.Share, allowed vmpod.HostDirectory) (*os.File, error) {
	place := filepath.Join(m.dir.file(sharesDir), s.ID)
	if err := os.MkdirAll(place, 0o700); err != nil {
		return nil, err
	}
	path := m.sockets[shareSocket]
	listener, err := listen(path)
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	defer os.Remove(path)
	// Connected before the server runs: it is accepted, or closed with us.
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	conn, err := c.File()
	if err != nil {
		return nil, err
	}
	server, err := startServer(m.d.virtiofsd, serverPlan{share: s, allowed: allowed.Path, place: place, log: place + ".log"}, listener)
	if err != nil {
		conn.Close()
		return nil, err
	}
	m.mu.Lock()
	groups := m.proc.Cgroups
	t := m.devices.with(s.ID, server)
	m.mu.Unlock()
	if err := accountServer(groups, server.PID); err != nil {
		m.log.Warn("server of a share is not limited by cgroups", "share", s.Path, "err", err)
	}
	if err := m.setTable(t); err != nil {
		conn.Close() // which ends it
		return nil, err
	}
	m.watchServer(shareEntry{Share: s, Server: &server})
	m.log.Info("host directory is shared", "share", s.Path, "read_only", s.ReadOnly, "server", server.PID)
	return conn, nil
}

// accountServer puts a server into the cgroups of its VM, and the child that it
// may have made meanwhile: in the end that one serves.
func accountServer(groups []string, pid int) error {
	err := enterCgroups(groups, pid)
	id := strconv.Itoa(pid)
	children, _ := os.ReadFile("/proc/" + id + "/task/" + id + "/children") // not in every kernel
	for _, child := range strings.Fields(string(children)) {
		if n, cerr := strconv.Atoi(child); cerr == nil {
			err = errors.Join(err, enterCgroups(groups, n))
		}
	}
	return err
}

// with returns the table with the server of a share.
func (t deviceTable) with(id string, server process) deviceTable {
	shares := make([]shareEntry, len(t.Shares))
	copy(shares, t.Shares)
	for i := range shares {
		if shares[i].ID == id {
			shares[i].Server = &server
		}
	}
	t.Shares = shares
	return t
}

// watchServer tells of a server that ends before its VM: what the guest still
// wants of the share then waits for ever.
func (m *Machine) watchServer(e shareEntry) {
	if e.Server == nil {
		return
	}
	m.background.Go(func() {
		fd, err := e.Server.open()
		if err != nil {
			m.serverEnded(e)
			return
		}
		defer fd.Close()
		stop := context.AfterFunc(m.d.life, func() { fd.Close() })
		defer stop()
		if waitPidfd(fd) == nil {
			m.serverEnded(e)
		}
	})
}

// serverGrace is how long QEMU, which a server follows, may take to be seen as
// gone.
const serverGrace = time.Second

func (m *Machine) serverEnded(e shareEntry) {
	select {
	case <-m.gone:
		return
	case <-m.d.life.Done():
		return
	case <-time.After(serverGrace):
	}
	// Not while the share is being unplugged: then its server has to end.
	m.plugging.Lock()
	defer m.plugging.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range m.devices.Shares {
		if o.ID != e.ID || o.Server == nil || o.Server.PID != e.Server.PID || o.Server.Start != e.Server.Start {
			continue
		}
		if m.faults.lost == nil {
			m.faults.lost = map[string]string{}
		}
		m.faults.lost[e.ID] = e.Path
		m.log.Error("server of a shared host directory has ended: the pod hangs where it uses it", "share", e.Path,
			"server", e.Server.PID, "said", lastLine(filepath.Join(m.dir.file(sharesDir), e.ID+".log")))
	}
}

// dropShare takes back what was added for a share that QEMU has no device of.
func (m *Machine) dropShare(ctx context.Context, q *qmpConn, e shareEntry) error {
	name := shareName(e.ID)
	_ = q.run(ctx, "chardev-remove", map[string]any{"id": name}, nil) // may not have been added
	_ = q.run(ctx, "closefd", map[string]any{"fdname": name}, nil)    // likewise
	m.mu.Lock()
	delete(m.faults.lost, e.ID)
	m.mu.Unlock()
	return e.stop()
}

// serverPatience is how long a server may take to end after its connection.
const serverPatience = 2 * time.Second

// stop waits until the share's server has ended, which it does when nobody is
// connected to it, and kills one that does not.
func (e shareEntry) stop() error {
	if e.Server == nil {
		return nil
	}
	fd, err := e.Server.open()
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer fd.Close()
	kill := time.AfterFunc(serverPatience, func() { _ = killPidfd(fd) })
	defer kill.Stop()
	give := time.AfterFunc(killPatience, func() { fd.Close() })
	defer give.Stop()
	if err := waitPidfd(fd); err != nil {
		return fmt.Errorf("server of host directory %s (pid %d) was killed and does not end: look for a host file system that hangs: %w",
			e.Path, e.Server.PID, errdefs.ErrUnavailable)
	}
	return nil
}

// stopServers sees to it that no server outlives a VM that is being removed.
func (m *Machine) stopServers() error {
	var errs []error
	for _, e := range m.table().Shares {
		errs = append(errs, e.stop())
	}
	return errors.Join(errs...)
}
