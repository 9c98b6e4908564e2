package qemu

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/vmpod"
)

// A templateError is a template's own fault, or its clone's: a boot may do.
type templateError struct{ err error }

func (e *templateError) Error() string { return e.err.Error() }
func (e *templateError) Unwrap() error { return e.err }

// launchClone makes a VM of a template, or nothing. The caller has its turn.
// Nothing is recorded before the VM runs with all that it was launched with,
// so whoever comes after a crash undoes it.
func (d *Driver) launchClone(ctx context.Context, spec vmpod.Spec, t *template) (_ *Machine, err error) {
	log := d.log.With("pod_uid", spec.ID.PodUID, "attempt", spec.ID.Attempt)
	dir, err := createVMDir(d.cfg.StateDir, spec)
	if err != nil {
		return nil, err
	}
	failpoint.Hit(failpoint.CloneDirMade)
	var m *Machine
	defer func() {
		if err != nil {
			d.undoLaunch(m, spec, dir, log)
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, launchPatience)
	defer cancel()
	warm := d.templates.takeWarm(t)
	if warm != nil {
		if m, err = d.claimWarm(warm, spec, dir); err == nil {
			m.account() // at once: where it waited it gives way to all pods
		}
		d.sweepScratch(warm.id) // the group that it was in
	} else {
		m, err = d.startClone(ctx, spec, dir, t)
	}
	if err != nil {
		return nil, err
	}
	q, err := m.monitor(ctx)
	if err != nil {
		return nil, err
	}
	if warm == nil {
		if err := restore(ctx, q, t); err != nil {
			if ctx.Err() == nil {
				err = &templateError{err}
			}
			return nil, err
		}
		failpoint.Hit(failpoint.CloneRestored)
	}
	if err := m.equip(ctx, q, t); err != nil {
		return nil, err
	}
	failpoint.Hit(failpoint.CloneEquipped)
	if warm == nil {
		m.account()
	}
	if err := q.run(ctx, "cont", nil, nil); err != nil {
		return nil, err
	}
	failpoint.Hit(failpoint.CloneContinued)
	m.mu.Lock()
	err = dir.write(processFile, m.proc)
	m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	failpoint.Hit(failpoint.CloneRecorded)
	m.transition(vmpod.EventStarted)
	d.remember(m)
	kind := kindClone
	if warm != nil {
		kind = kindWarm
	}
	d.templates.count(kind, "")
	log.Info("pod VM cloned", "pid", m.proc.PID, "accelerator", m.proc.Accelerator, "cpus", spec.CPUs, "memory", spec.Memory,
		"template", t.name, "template_memory", t.shape.memory, "warm", warm != nil)
	return m, nil
}

// account puts a clone's QEMU into groups of its own.
func (m *Machine) account() {
	m.mu.Lock()
	m.proc.Cgroups = m.d.account(m.launched, m.proc.PID, m.overhead())
	m.mu.Unlock()
	failpoint.Hit(failpoint.CloneAccounted)
}

// startClone runs a QEMU that waits for its devices' state.
func (d *Driver) startClone(ctx context.Context, spec vmpod.Spec, dir vmDir, t *template) (*Machine, error) {
	c := d.templateCommand(t.shape, t.ram, true)
	c.spec = t.shape.of(spec)
	proc, kid, err := d.exec(ctx, spec.ID, dir, c)
	if err != nil {
		return nil, err
	}
	failpoint.Hit(failpoint.CloneStarted)
	return d.superviseClone(spec, dir, t, proc, kid)
}

// superviseClone makes a Machine of a QEMU that no record knows yet.
func (d *Driver) superviseClone(spec vmpod.Spec, dir vmDir, t *template, proc process, kid *child) (*Machine, error) {
	proc.Accelerator, proc.Template = d.accel, t.name
	// A page of the template that no clone had touched is its first toucher's.
	proc.Overhead = d.cfg.Overhead + max(t.shape.memory-t.bytes, 0) + growStep
	_, proc.MaxMemory = d.cfg.room(t.shape.spec(spec.ID))
	m := newMachine(d, spec, dir, proc)
	m.child = kid
	if !t.shape.furnished {
		m.devices = cloneDevices(spec)
	}
	m.origin = vmpod.Origin{Cloned: true, Grown: memoryMiB(spec)<<20 > t.shape.memory}
	var err error
	if m.pidfd, err = proc.open(); err != nil {
		_ = unix.Kill(proc.PID, unix.SIGKILL) // still our child, or a zombie
		<-kid.ended
		return nil, &templateError{fmt.Errorf("QEMU ended at once: %s: %w", lastLine(dir.file(stderrFile)), err)}
	}
	m.supervise(false)
	return m, nil
}

// cloneDevices is the table of a clone of a template without devices: its NICs
// are plugged like its disks. Else it is a boot's.
func cloneDevices(s vmpod.Spec) deviceTable {
	t := bootDevices(s)
	for i := range t.NICs {
		t.NICs[i].Slot = len(s.Disks) + 1 + i
	}
	return t
}

// equip gives a clone that has not yet run what is its own: disks, NICs, and
// the memory that its template lacks.
func (m *Machine) equip(ctx context.Context, q *qmpConn, t *template) error {
	m.plugging.Lock()
	defer m.plugging.Unlock()
	table := m.table()
	if err := m.setTable(table); err != nil {
		return err
	}
	disks, nics := table.Disks, table.NICs
	if t.shape.furnished {
		if err := showSize(ctx, q, disks[0].Disk); err != nil {
			return err
		}
		disks, nics = disks[1:], nics[1:]
	}
	for _, e := range disks {
		if err := addDisk(ctx, q, e.Disk, e.Slot); err != nil {
			return err
		}
	}
	for _, e := range nics {
		if err := addNIC(ctx, q, e.NIC, e.Slot); err != nil {
			return err
		}
	}
	if !m.origin.Grown {
		return nil
	}
	have := growth{Extent: vmpod.Extent{Memory: t.shape.memory, MaxMemory: m.proc.MaxMemory}, base: t.shape.memory}
	memory := min(have.base+(m.launched.Memory-have.base+growStep-1)/growStep*growStep, have.MaxMemory)
	return m.offerMemory(ctx, q, have, memory)
}

// showSize has the guest look how large a disk is: it knows the size of the
// one that its template had. QEMU tells it when a disk is resized, if only to
// the size that it has.
func showSize(ctx context.Context, q *qmpConn, disk vmpod.Disk) error {
	st, err := os.Stat(disk.Path)
	if err != nil {
		return err
	}
	return q.run(ctx, "block_resize", map[string]any{"node-name": nodeName(disk.ID), "size": st.Size()}, nil)
}

// Origin implements vmpod.Originator.
func (m *Machine) Origin() vmpod.Origin { return m.origin }
