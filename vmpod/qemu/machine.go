package qemu

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/vmpod"
)

// A Machine is one QEMU.
type Machine struct {
	d        *Driver
	id       vmpod.ID
	dir      vmDir
	log      *slog.Logger
	launched vmpod.Spec
	sockets  map[string]string

	// Set before supervise and not changed after, but for proc.Cgroups (mu).
	proc  process
	pidfd *os.File
	child *child // nil if another process started it
	// origin is how it came to be, as far as this process knows.
	origin vmpod.Origin

	// background counts the goroutines that watch QEMU.
	background sync.WaitGroup
	// gone is closed when the process has ended, ended when the reason for
	// that is known as well.
	gone, ended chan struct{}

	// plugging serialises changes of devices and growth.
	plugging sync.Mutex

	mu        sync.Mutex
	state     vmpod.State
	exit      *vmpod.Exit // set before ended is closed, sometimes well before
	qmp       *qmpConn
	connected chan struct{} // closed when qmp is set, replaced when it is lost
	seen      evidence
	faults    diskFaults
	vouched   time.Time // when QEMU has said last that the guest runs; zero: ask it
	stops     int       // how often it has told of a stop, or could not
	stalls    int       // how often a full datastore has paused it
	awaiting  bool      // somebody waits for room to let it go on
	devices   deviceTable
	copies    map[string]*diskCopy // by disk ID: those of this process
	extent    *vmpod.Extent        // what QEMU said last; nil before it was asked
	agent     *agentConn
	removed   bool
}

func newMachine(d *Driver, spec vmpod.Spec, dir vmDir, proc process) *Machine {
	return &Machine{
		d: d, id: spec.ID, dir: dir, proc: proc, launched: spec,
		log:       d.log.With("pod_uid", spec.ID.PodUID, "attempt", spec.ID.Attempt),
		sockets:   d.socketPaths(spec.ID),
		gone:      make(chan struct{}),
		ended:     make(chan struct{}),
		connected: make(chan struct{}),
		state:     vmpod.StateLaunching,
		devices:   bootDevices(spec),
		origin:    vmpod.Origin{Cloned: proc.Template != ""},
	}
}

// load reads what an earlier process wrote beside spec and process.
func (m *Machine) load() error {
	if _, err := m.dir.read(devicesFile, &m.devices); err != nil {
		return err
	}
	var stop stopIntent
	stopping, err := m.dir.read(stopFile, &stop)
	if err != nil {
		return err
	}
	var exit vmpod.Exit
	exited, err := m.dir.read(exitFile, &exit)
	if err != nil {
		return err
	}
	if exited {
		m.exit = &exit
	}
	m.state = vmpod.StateRunning
	if stopping {
		m.seen.stopAsked = true
		m.transition(vmpod.EventStop)
	}
	return nil
}

// transition moves the machine along vmpod's table.
func (m *Machine) transition(e vmpod.Event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.transitionLocked(e)
}

func (m *Machine) transitionLocked(e vmpod.Event) {
	next, err := vmpod.Next(m.state, e)
	if err != nil {
		m.log.Debug("event does not fit", "err", err)
		return
	}
	m.state = next
}

// Spec implements vmpod.Machine.
func (m *Machine) Spec() vmpod.Spec {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.devices.spec(m.launched)
	if m.extent != nil {
		s.CPUs = m.extent.CPUs
		if m.extent.Memory > memoryMiB(s)<<20 {
			s.Memory = m.extent.Memory
		}
	}
	return s
}

// Status implements vmpod.Machine. While the machine runs, Reason and Message
// are empty, or tell of disk errors that the guest has met.
func (m *Machine) Status(ctx context.Context) (vmpod.Status, error) {
	select {
	case <-m.ended:
		return m.status(vmpod.StateStopped, nil), nil
	default:
	}
	m.trimStderr()
	ctx, cancel := context.WithTimeout(ctx, m.d.cfg.Deadline)
	defer cancel()
	var err error
	switch {
	case stopped(m.proc.PID): // it cannot answer: do not wait for it
		err = errVMMStopped
	case !m.evidentlyRuns():
		err = m.ping(ctx)
	}
	select {
	case <-m.ended: // while we asked
		return m.status(vmpod.StateStopped, nil), nil
	default:
	}
	m.mu.Lock()
	if err != nil {
		m.transitionLocked(vmpod.EventSilent)
	} else {
		m.transitionLocked(vmpod.EventAnswered)
	}
	state := m.state
	m.mu.Unlock()
	return m.status(state, err), nil
}

// maxStderr is far more than an honest QEMU says, in bytes.
const maxStderr = 1 << 20

// trimStderr empties QEMU's own log when it has grown: some warnings a guest
// can cause again and again.
func (m *Machine) trimStderr() {
	if st, err := os.Stat(m.dir.file(stderrFile)); err == nil && st.Size() > maxStderr {
		if err := os.Truncate(m.dir.file(stderrFile), 0); err != nil {
			m.log.Warn("QEMU's log cannot be trimmed", "err", err)
		}
	}
}

// vouchFor is how long QEMU's word that the guest runs is good, as long as it
// tells of no stop and waits for something to do.
const vouchFor = 30 * time.Second

// evidentlyRuns says that QEMU need not be asked. It reads its monitor byte by
// byte, with five system calls for each, so that to ask costs it some 2 ms, and
// an idle VM is looked at every few seconds. A QEMU whose main loop sleeps in
// poll would answer.
func (m *Machine) evidentlyRuns() bool {
	m.mu.Lock()
	known := m.state == vmpod.StateRunning && m.qmp != nil && time.Since(m.vouched) < vouchFor
	m.mu.Unlock()
	return known && polls(m.proc.PID)
}

// ping asks QEMU for its state.
func (m *Machine) ping(ctx context.Context) error {
	q, err := m.monitor(ctx)
	if err != nil {
		return err
	}
	var s struct {
		Status string `json:"status"`
	}
	m.mu.Lock()
	asked, stops := time.Now(), m.stops
	m.mu.Unlock()
	if err := q.run(ctx, "query-status", nil, &s); err != nil {
		return err
	}
	switch s.Status {
	case "paused":
		return errVMPaused
	case "running":
		m.mu.Lock()
		if m.stops == stops {
			m.vouched = asked
		}
		m.mu.Unlock()
	case ioErrorState:
		return errDatastoreFull
	}
	return nil
}

// status describes a state; asked is why it is StateUnknown.
func (m *Machine) status(state vmpod.State, asked error) vmpod.Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := vmpod.Status{State: state, StartedAt: m.proc.StartedAt, PID: m.proc.PID}
	switch state {
	case vmpod.StateStopped:
		s.Reason, s.Message, s.PID = string(m.exit.Reason), m.exit.Message, 0
	case vmpod.StateUnknown:
		s.Reason, s.Message = describeSilence(m.proc.PID, asked)
	case vmpod.StateStopping:
		s.Reason, s.Message = "Stopping", "the machine was asked to stop"
	case vmpod.StateLaunching:
		s.Reason, s.Message = "Launching", "QEMU is being started"
	case vmpod.StateRunning:
		s.Reason, s.Message = m.faults.describe(time.Now())
	}
	return s
}

// An agentConn is the one connection that the agent's port serves.
type agentConn struct {
	net.Conn
	m *Machine
}

func (c *agentConn) Close() error {
	c.m.mu.Lock()
	if c.m.agent == c {
		c.m.agent = nil
	}
	c.m.mu.Unlock()
	return c.Conn.Close()
}

// CloseWrite is there for copies that end one direction; QEMU has no half
// connection, so it closes both.
func (c *agentConn) CloseWrite() error { return c.Close() }

// Dial implements vmpod.Machine. QEMU serves one connection at a time and
// leaves others waiting, so the one that this process holds is closed first.
func (m *Machine) Dial(ctx context.Context) (net.Conn, error) {
	select {
	case <-m.gone:
		return nil, fmt.Errorf("pod VM %s is off: %w", m.id, errdefs.ErrUnavailable)
	default:
	}
	m.closeAgent()
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", m.sockets[agentSocket])
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("pod VM %s: agent channel: %v: %w", m.id, err, errdefs.ErrUnavailable)
	}
	conn := &agentConn{Conn: c, m: m}
	m.mu.Lock()
	old := m.agent
	m.agent = conn
	m.mu.Unlock()
	if old != nil { // another Dial came between; the later one stays
		old.Conn.Close()
	}
	return conn, nil
}

// closeAgent ends the connection that this process holds, if any.
func (m *Machine) closeAgent() {
	m.mu.Lock()
	c := m.agent
	m.agent = nil
	m.mu.Unlock()
	if c != nil {
		c.Conn.Close()
	}
}

// Wait implements vmpod.Machine.
func (m *Machine) Wait(ctx context.Context) (vmpod.Exit, error) {
	select {
	case <-m.ended:
		m.mu.Lock()
		defer m.mu.Unlock()
		return *m.exit, nil
	case <-ctx.Done():
		return vmpod.Exit{}, ctx.Err()
	case <-m.d.life.Done():
		select {
		case <-m.ended:
			return m.Wait(ctx)
		default:
		}
		return vmpod.Exit{}, fmt.Errorf("pod VM %s: the QEMU driver is closed: %w", m.id, errdefs.ErrUnavailable)
	}
}

// Stop implements vmpod.Machine. The guest is asked by ACPI's power button.
func (m *Machine) Stop(ctx context.Context, grace time.Duration) error {
	select {
	case <-m.ended:
		return nil
	default:
	}
	if err := m.intendStop(); err != nil {
		return err
	}
	failpoint.Hit(failpoint.QuitIntended)
	if grace > 0 {
		if err := m.pressPower(ctx, grace); err != nil {
			return err
		}
	}
	return m.kill()
}

// intendStop records that the end which follows was asked for.
func (m *Machine) intendStop() error {
	m.mu.Lock()
	asked, removed := m.seen.stopAsked, m.removed
	m.seen.stopAsked = true
	m.transitionLocked(vmpod.EventStop)
	m.mu.Unlock()
	if asked || removed {
		return nil
	}
	if err := m.dir.write(stopFile, stopIntent{At: time.Now()}); err != nil {
		// A full disk must not keep a VM from being stopped; only the reason
		// would be told wrong, should this process die before the VM.
		m.log.Warn("intent to stop cannot be recorded", "err", err)
	}
	return nil
}

// pressPower asks the guest to power off and waits until it has, grace is
// over or ctx ends; the last is an error.
func (m *Machine) pressPower(ctx context.Context, grace time.Duration) error {
	timer := time.NewTimer(grace)
	defer timer.Stop()
	asking, cancel := context.WithTimeout(ctx, min(grace, m.d.cfg.Deadline))
	defer cancel()
	q, err := m.monitor(asking)
	if err == nil {
		err = q.run(asking, "system_powerdown", nil, nil)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		select {
		case <-m.ended:
		default:
			m.log.Warn("guest cannot be asked to power off", "err", err)
		}
		return nil
	}
	select {
	case <-m.ended:
	case <-timer.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// quitPatience is how long QEMU may take to write out what it has in flight
// when it is told to quit, before it is killed.
const quitPatience = 2 * time.Second

// kill ends QEMU and waits until it has gone and the reason is recorded. It
// depends on no context: what was begun is brought to its end.
func (m *Machine) kill() error {
	ctx, cancel := context.WithTimeout(context.Background(), quitPatience)
	defer cancel()
	m.mu.Lock()
	q := m.qmp
	m.mu.Unlock()
	if q != nil {
		_ = q.run(ctx, "quit", nil, nil) // a QEMU that quits may not answer
		select {
		case <-m.gone:
		case <-ctx.Done():
		}
	}
	select {
	case <-m.gone:
	default:
		if err := killPidfd(m.pidfd); err != nil {
			return fmt.Errorf("pod VM %s: kill QEMU (pid %d): %w", m.id, m.proc.PID, err)
		}
	}
	select {
	case <-m.ended:
		failpoint.Hit(failpoint.QuitRecorded)
		return nil
	case <-m.d.life.Done():
		return fmt.Errorf("the QEMU driver is closed: %w", errdefs.ErrUnavailable)
	case <-time.After(killPatience):
		return fmt.Errorf("pod VM %s: QEMU (pid %d) was killed and does not end: look for a host disk that hangs: %w",
			m.id, m.proc.PID, errdefs.ErrUnavailable)
	}
}

// Remove implements vmpod.Machine.
func (m *Machine) Remove(ctx context.Context) error {
	done, err := m.d.take(ctx, m.id)
	if err != nil {
		return err
	}
	defer done()
	m.mu.Lock()
	removed := m.removed
	m.mu.Unlock()
	if removed {
		return nil
	}
	if err := m.Stop(ctx, 0); err != nil {
		return err
	}
	m.background.Wait()
	if err := m.stopServers(); err != nil {
		return fmt.Errorf("remove pod VM %s: %w", m.id, err)
	}
	if err := m.d.undo(m.launched, m.dir); err != nil {
		return fmt.Errorf("remove pod VM %s: %w", m.id, err)
	}
	m.mu.Lock()
	m.removed = true
	m.mu.Unlock()
	m.d.forget(m)
	m.log.Info("pod VM removed")
	return nil
}

// Counters implements vmpod.Meter.
func (m *Machine) Counters(context.Context) (vmpod.Usage, error) {
	u := vmpod.Usage{Time: time.Now()}
	m.mu.Lock()
	groups := m.proc.Cgroups
	m.mu.Unlock()
	var ok bool
	if u.CPU, ok = cgroupCPU(groups); m.off() {
		if !ok {
			return u, fmt.Errorf("pod VM %s is off: %w", m.id, errdefs.ErrUnavailable)
		}
		return u, nil
	}
	if !ok {
		var err error
		if _, u.CPU, err = procStat(m.proc.PID); err != nil {
			return u, fmt.Errorf("pod VM %s: CPU time: %w", m.id, err)
		}
	}
	var err error
	if u.Resident, err = residentCount(m.proc.PID); err != nil {
		return u, fmt.Errorf("pod VM %s: resident memory: %w", m.id, err)
	}
	return u, nil
}

// Usage implements vmpod.Meter.
func (m *Machine) Usage(ctx context.Context) (vmpod.Usage, error) {
	u, err := m.Counters(ctx)
	if err != nil || m.off() {
		return u, err
	}
	if u.Resident, u.Proportional, err = residentMemory(m.proc.PID); err != nil {
		return u, fmt.Errorf("pod VM %s: usage: %w", m.id, err)
	}
	return u, nil
}

func (m *Machine) off() bool {
	select {
	case <-m.gone:
		return true
	default:
		return false
	}
}
