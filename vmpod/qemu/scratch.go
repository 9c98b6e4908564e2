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
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
)

// A scratch is a QEMU that is no pod's: a template being made or tried, or a
// clone that waits for its pod. No record knows it. It is recognised by its
// name, which no pod's VM can have, and ended by the next driver.
type scratch struct {
	d       *Driver
	id      vmpod.ID
	sockets map[string]string
	proc    process
	child   *child
	pidfd   *os.File
	q       *qmpConn
	stderr  string
	// template is what a clone is of, nil while it is not loaded.
	template *template
}

// What a scratch is for.
const (
	scratchTemplate = "template"
	scratchTrial    = "trial"
	scratchWarm     = "warm"
)

// scratchID is a name with a character that no pod's UID has. It carries the
// driver's own, since others run on the same host.
func (d *Driver) scratchID(what string) vmpod.ID {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.scratches++
	return vmpod.ID{PodUID: what + "~" + d.instance(), Attempt: d.scratches}
}

// startScratch runs QEMU and connects to its monitor. A mortal one is killed
// by the kernel when this process ends.
func (d *Driver) startScratch(ctx context.Context, what string, c command, from *nowhere, mortal bool) (_ *scratch, err error) {
	id := d.scratchID(what)
	c.spec.ID, c.paused = id, c.clone
	s := &scratch{d: d, id: id, sockets: d.socketPaths(id), stderr: d.templateFile(id.String(), stderrSuffix)}
	if err := os.MkdirAll(d.templateDir(), 0o700); err != nil {
		return nil, err
	}
	// First there and last to go, it also tells the next driver of all the rest.
	stderr, err := os.OpenFile(s.stderr, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	defer func() {
		if err != nil {
			s.end()
		}
	}()
	files := &fdTable{sockets: s.sockets, nowhere: from}
	defer files.close()
	args, err := c.argv(files)
	if err = errors.Join(err, files.err, ctx.Err()); err != nil {
		return nil, err
	}
	cfg, err := d.withUser(id)
	if err != nil {
		return nil, err
	}
	if s.proc, s.child, err = startQEMU(cfg, from, args, files.files, d.groups(), stderr, mortal); err != nil {
		return nil, err
	}
	if s.pidfd, err = s.proc.open(); err != nil {
		return nil, s.failure(err)
	}
	files.close() // the sockets are QEMU's now: they close when it ends
	ctx, cancel := context.WithTimeout(ctx, launchPatience)
	defer cancel()
	if s.q, err = dialQMP(ctx, s.sockets[qmpSocket], nil); err != nil {
		return nil, s.failure(err)
	}
	s.proc.Cgroups = d.account(scratchPool(c.spec), s.proc.PID, d.cfg.Overhead+c.spec.Memory)
	return s, nil
}

// templatesPool is where scratches are accounted. Whatever QEMU's nice is, it
// counts within a group only: that pods go first is the pool's weight.
const templatesPool = "templates"

func scratchPool(spec vmpod.Spec) vmpod.Spec {
	spec.Pool = templatesPool
	return spec
}

// failure adds what QEMU itself had to say.
func (s *scratch) failure(err error) error {
	if said := lastLine(s.stderr); said != "" {
		return fmt.Errorf("%w (QEMU said: %s)", err, said)
	}
	return err
}

// agent connects to the agent's channel.
func (s *scratch) agent(ctx context.Context) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "unix", s.sockets[agentSocket])
}

// end ends QEMU, if it runs, and takes back all that is there for it.
func (s *scratch) end() {
	if s.q != nil {
		s.q.close()
	}
	if s.child != nil {
		if s.pidfd != nil {
			_ = killPidfd(s.pidfd)
		} else {
			_ = unix.Kill(s.proc.PID, unix.SIGKILL) // our child, or a zombie
		}
		<-s.child.ended
	}
	if s.pidfd != nil {
		s.pidfd.Close()
	}
	s.d.sweepScratch(s.id)
}

// sweepScratch takes back what there is for a scratch whose QEMU has ended.
func (d *Driver) sweepScratch(id vmpod.ID) {
	var dirs []string
	for _, h := range d.trees {
		dirs = append(dirs, filepath.Join(h.root, d.cgroupPath(scratchPool(vmpod.Spec{ID: id}))))
	}
	if err := removeCgroups(dirs, d.cfg.Cgroup); err != nil {
		d.log.Warn("cgroup of a template stays", "vm", id.String(), "err", err)
	}
	for _, path := range d.socketPaths(id) {
		os.Remove(path)
	}
	d.mu.Lock()
	d.users.release(id)
	d.mu.Unlock()
	os.Remove(d.templateFile(id.String(), stderrSuffix))
}

// settle waits until the guest has nothing more to do: what it still does of
// its boot would be done again by every clone.
func (s *scratch) settle(ctx context.Context) error {
	const quiet, pause = 5, 100 * time.Millisecond
	before, calm := ^uint64(0), 0
	for {
		_, cpu, err := procStat(s.proc.PID)
		if err != nil {
			return fmt.Errorf("QEMU is gone: %w", errdefs.ErrUnavailable)
		}
		// One that the host does not let run is not one that has nothing to do.
		if cpu <= before+tick && !s.runnable() {
			calm++
		} else {
			calm = 0
		}
		if calm == quiet {
			return nil
		}
		before = cpu
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil // a guest that is never idle can be saved all the same
		}
	}
}

// tick is the unit in which the kernel tells a process's CPU time, in ns.
const tick = 10_000_000

// runnable says whether a thread runs, wants to, or waits for a disk.
func (s *scratch) runnable() bool {
	files, _ := filepath.Glob("/proc/" + strconv.Itoa(s.proc.PID) + "/task/*/stat")
	for _, f := range files {
		if strings.IndexByte("RD", threadState(f)) >= 0 {
			return true
		}
	}
	return false
}

// instance tells this driver's scratches from another's.
func (d *Driver) instance() string { return shortHash(d.cfg.StateDir, 8) }

// endScratches kills what an earlier driver left: every scratch that no pod's
// record has taken over. It returns when they are gone.
func (d *Driver) endScratches() error {
	records, err := d.recorded()
	if err != nil {
		return err
	}
	taken := map[int]process{}
	for _, p := range records {
		taken[p.PID] = p
	}
	ids := map[vmpod.ID]bool{}
	left := openVMs(func(name string, pid int) bool {
		if _, ours := d.scratchOf(name); !ours {
			return false
		}
		p, err := taken[pid].open()
		if err == nil {
			p.Close()
		}
		return errors.Is(err, errGone) // else a pod's
	})
	for _, p := range left {
		_ = killPidfd(p.pidfd)
	}
	for _, p := range left {
		stop := time.AfterFunc(killPatience, func() { p.pidfd.Close() })
		_ = waitPidfd(p.pidfd)
		stop.Stop()
		p.pidfd.Close()
		id, _ := d.scratchOf(p.name)
		ids[id] = true
	}
	// Sockets and groups may be there without a process.
	files, _ := filepath.Glob(filepath.Join(d.templateDir(), "*~"+d.instance()+"_*"+stderrSuffix))
	for _, h := range d.trees {
		dirs, _ := filepath.Glob(filepath.Join(h.root, d.cfg.Cgroup, templatesPool, "*~"+d.instance()+"_*"))
		files = append(files, dirs...)
	}
	for _, path := range files {
		if id, err := vmpod.ParseID(strings.TrimSuffix(filepath.Base(path), stderrSuffix)); err == nil {
			ids[id] = true
		}
	}
	for id := range ids {
		d.sweepScratch(id)
	}
	if len(ids) > 0 {
		d.log.Info("templates that an earlier process was making are gone", "count", len(ids))
	}
	return nil
}

// scratchOf reads the ID of a scratch of this driver off a process's name.
func (d *Driver) scratchOf(name string) (vmpod.ID, bool) {
	name, ours := strings.CutPrefix(name, vmPrefix)
	id, err := vmpod.ParseID(name)
	return id, ours && err == nil && strings.HasSuffix(id.PodUID, "~"+d.instance())
}
