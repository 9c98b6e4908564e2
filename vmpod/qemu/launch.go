package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/vmpod"
)

// launch makes a VM that is not there, or nothing: a clone if it can be one.
// The caller has its turn.
func (d *Driver) launch(ctx context.Context, spec vmpod.Spec) (*Machine, error) {
	t, reason := d.templates.choose(spec)
	if t != nil {
		m, err := d.launchClone(ctx, spec, t)
		d.templates.release(t)
		if err == nil {
			d.templates.worked(t)
		}
		if err == nil || ctx.Err() != nil {
			return m, err
		}
		d.log.Warn("pod VM cannot be cloned and is booted", "pod_uid", spec.ID.PodUID, "attempt", spec.ID.Attempt, "err", err)
		var broken *templateError
		if reason = coldFailed; errors.As(err, &broken) {
			d.templates.failed(t, err)
		}
	}
	m, err := d.launchCold(ctx, spec, reason)
	if err == nil {
		d.templates.count(kindCold, reason)
	}
	return m, err
}

// undoLaunch takes a launch back that failed; m is nil if there is no QEMU.
func (d *Driver) undoLaunch(m *Machine, spec vmpod.Spec, dir vmDir, log *slog.Logger) {
	if m != nil {
		if err := m.kill(); err != nil {
			log.Error("QEMU of a failed launch does not go away", "err", err)
		}
		m.background.Wait()
	}
	if err := d.undo(spec, dir); err != nil {
		log.Error("launch cannot be undone", "err", err)
	}
}

// launchCold boots a VM that is not there, or leaves nothing. The reason is why
// it is not a clone.
func (d *Driver) launchCold(ctx context.Context, spec vmpod.Spec, reason string) (_ *Machine, err error) {
	log := d.log.With("pod_uid", spec.ID.PodUID, "attempt", spec.ID.Attempt)
	dir, err := createVMDir(d.cfg.StateDir, spec)
	if err != nil {
		return nil, err
	}
	failpoint.Hit(failpoint.LaunchDirMade)
	var m *Machine
	defer func() {
		if err != nil {
			d.undoLaunch(m, spec, dir, log)
		}
	}()
	m, err = d.start(ctx, spec, dir)
	if err != nil {
		return nil, err
	}
	m.origin.Reason = reason
	ctx, cancel := context.WithTimeout(ctx, launchPatience)
	defer cancel()
	q, err := m.monitor(ctx)
	if err != nil {
		return nil, err
	}
	failpoint.Hit(failpoint.LaunchMonitored)
	// Only now into its cgroup: KVM creates a VM many times slower inside one.
	// The CPUs are still stopped, so that no guest memory is charged elsewhere.
	m.mu.Lock()
	m.proc.Cgroups = d.account(spec, m.proc.PID, d.cfg.Overhead)
	failpoint.Hit(failpoint.LaunchAccounted)
	err = dir.write(processFile, m.proc)
	m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if err := q.run(ctx, "cont", nil, nil); err != nil {
		return nil, err
	}
	failpoint.Hit(failpoint.LaunchContinued)
	m.transition(vmpod.EventStarted)
	d.remember(m)
	log.Info("pod VM launched", "pid", m.proc.PID, "accelerator", m.proc.Accelerator, "cpus", spec.CPUs, "memory", spec.Memory)
	return m, nil
}

// start runs QEMU with the CPUs stopped.
func (d *Driver) start(ctx context.Context, spec vmpod.Spec, dir vmDir) (*Machine, error) {
	command := d.command(spec)
	proc, kid, err := d.exec(ctx, spec.ID, dir, command)
	if err != nil {
		return nil, err
	}
	failpoint.Hit(failpoint.LaunchStarted)
	proc.Accelerator, proc.SharedMemory, proc.MaxMemory = d.accel, d.sharesMemory(), command.maxMemory
	m := newMachine(d, spec, dir, proc)
	m.child = kid
	if err := dir.write(processFile, proc); err != nil {
		_ = unix.Kill(proc.PID, unix.SIGKILL) // our child, so it fails only if that is dead
		<-kid.ended
		return nil, err
	}
	failpoint.Hit(failpoint.LaunchRecorded)
	if m.pidfd, err = proc.open(); err != nil {
		_ = unix.Kill(proc.PID, unix.SIGKILL) // still our child, or a zombie
		<-kid.ended
		return nil, fmt.Errorf("QEMU ended at once: %s: %w", lastLine(dir.file(stderrFile)), errdefs.ErrUnknown)
	}
	m.supervise(false)
	return m, nil
}

// exec runs a QEMU that no record knows yet.
func (d *Driver) exec(ctx context.Context, id vmpod.ID, dir vmDir, c command) (process, *child, error) {
	files := &fdTable{sockets: d.socketPaths(id)}
	defer files.close()
	args, err := c.argv(files)
	if err = errors.Join(err, files.err, ctx.Err()); err != nil {
		return process{}, nil, err
	}
	if !c.clone {
		failpoint.Hit(failpoint.LaunchListening)
	}
	stderr, err := os.OpenFile(dir.file(stderrFile), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return process{}, nil, err
	}
	defer stderr.Close()
	cfg, err := d.withUser(id)
	if err != nil {
		return process{}, nil, err
	}
	return startQEMU(cfg, d.nowhere, args, files.files, d.groups(), stderr, false)
}

func (d *Driver) command(spec vmpod.Spec) command {
	cpus, memory := d.cfg.room(spec)
	return command{spec: spec, maxCPUs: cpus, maxMemory: memory, guest: d.cfg.Guest, accel: d.accel, tscKHz: d.tscKHz, sandbox: d.qemu.sandbox, shared: d.sharesMemory(), paused: true}
}

// withUser is the driver's Config with the user that the VM is to run as.
func (d *Driver) withUser(id vmpod.ID) (Config, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	cfg := d.cfg
	uid, err := d.users.claim(id)
	if cfg.UIDs > 1 {
		cfg.UID, cfg.GID = uid, uid
	}
	return cfg, err
}

// groups are QEMU's supplementary groups: the one that may open /dev/kvm.
func (d *Driver) groups() []uint32 {
	var st unix.Stat_t
	if d.accel == AcceleratorKVM && unix.Stat("/dev/kvm", &st) == nil {
		return []uint32{st.Gid}
	}
	return nil
}

// account puts a VMM into cgroups of its own, which allow it the Spec's memory
// and the overhead, in bytes. A host whose cgroups cannot be
// written still runs VMs: what they may use is then bounded by their RAM alone.
func (d *Driver) account(spec vmpod.Spec, pid int, overhead int64) []string {
	if len(d.trees) == 0 {
		return nil
	}
	l := limits{memory: memoryMiB(spec)<<20 + overhead, cpus: spec.CPUs, idle: spec.Pool == templatesPool}
	dirs, err := createCgroups(d.trees, d.cgroupPath(spec), l)
	if err == nil {
		err = enterCgroups(dirs, pid)
	}
	if err != nil {
		d.log.Warn("pod VM is not limited by cgroups", "pod_uid", spec.ID.PodUID, "reason", err)
		if err := removeCgroups(dirs, d.cfg.Cgroup); err == nil {
			return nil
		}
	}
	return dirs
}

// undo erases what a launch made. It does not depend on how far that came.
func (d *Driver) undo(spec vmpod.Spec, dir vmDir) error {
	var dirs []string
	for _, h := range d.trees {
		dirs = append(dirs, filepath.Join(h.root, d.cgroupPath(spec)))
	}
	err := removeCgroups(dirs, d.cfg.Cgroup)
	failpoint.Hit(failpoint.EraseCgroups)
	d.mu.Lock()
	d.users.release(spec.ID)
	d.mu.Unlock()
	for _, path := range d.socketPaths(spec.ID) {
		os.Remove(path)
	}
	failpoint.Hit(failpoint.EraseSockets)
	return errors.Join(err, dir.erase())
}

// adopt makes a Machine of a directory that an earlier process left. A launch
// which that process did not finish is undone and gives ErrNotFound.
func (d *Driver) adopt(id vmpod.ID, dir vmDir) (*Machine, error) {
	var spec vmpod.Spec
	if ok, err := dir.read(specFile, &spec); err != nil || !ok || spec.ID != id {
		return nil, fmt.Errorf("pod VM %s: %s is missing or damaged (%v): remove the directory by hand: %w", id, dir.file(specFile), err, errdefs.ErrDataLoss)
	}
	var proc process
	ok, err := dir.read(processFile, &proc)
	if err != nil {
		return nil, err
	}
	if !ok {
		d.log.Warn("unfinished launch is undone", "pod_uid", id.PodUID, "attempt", id.Attempt)
		d.quitUnrecorded(id)
		if err := d.undo(spec, dir); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("pod VM %s was never launched: %w", id, errdefs.ErrNotFound)
	}
	d.mu.Lock()
	d.users.hold(id, proc.UID)
	d.mu.Unlock()
	m := newMachine(d, spec, dir, proc)
	if err := m.load(); err != nil {
		return nil, err
	}
	switch m.pidfd, err = proc.open(); {
	case errors.Is(err, errGone):
		m.finish(false)
	case err != nil:
		return nil, err
	default:
		m.supervise(true)
	}
	return m, nil
}

// equalSpecs compares two Specs; an empty list equals none.
func equalSpecs(a, b vmpod.Spec) bool {
	for _, s := range []*vmpod.Spec{&a, &b} {
		s.Disks, s.NICs = slices.Clone(s.Disks), slices.Clone(s.NICs)
		if len(s.Disks) == 0 {
			s.Disks = nil
		}
		if len(s.NICs) == 0 {
			s.NICs = nil
		}
		for i := range s.Disks {
			if s.Disks[i].Format == "" {
				s.Disks[i].Format = "raw"
			}
		}
	}
	return reflect.DeepEqual(a, b)
}

// launchPatience bounds the time from QEMU's start to its first answer, which
// is 50 ms on an idle host and many times that on a crowded one.
const launchPatience = time.Minute

// killPatience is how long a killed process may take to be gone: it must
// first complete what it has in flight with the host's disks.
const killPatience = 30 * time.Second
