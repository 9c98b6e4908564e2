package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/vmpod"
)

// supervise starts what watches QEMU: its process, monitor and console.
// adopted says that an earlier process launched it.
func (m *Machine) supervise(adopted bool) {
	consoleDone := make(chan struct{})
	m.background.Add(3)
	go func() {
		defer m.background.Done()
		defer close(consoleDone)
		m.copyConsole(m.d.life)
	}()
	monitorDone := make(chan struct{})
	go func() {
		defer m.background.Done()
		defer close(monitorDone)
		m.keepMonitor(adopted)
	}()
	go func() {
		defer m.background.Done()
		m.waitProcess()
		select {
		case <-m.gone:
		default: // detached
			<-monitorDone
			<-consoleDone
			return
		}
		failpoint.Hit(failpoint.QuitGone)
		// What QEMU said last is still in its sockets.
		<-monitorDone
		<-consoleDone
		m.finish(true)
	}()
}

// waitProcess closes gone when QEMU has ended. It returns early when the
// driver is closed.
func (m *Machine) waitProcess() {
	stop := context.AfterFunc(m.d.life, func() { m.pidfd.Close() })
	defer stop()
	if err := waitPidfd(m.pidfd); err == nil {
		close(m.gone)
	}
}

// monitor returns the connection to QEMU's monitor, waiting for it until ctx
// ends.
func (m *Machine) monitor(ctx context.Context) (*qmpConn, error) {
	for {
		m.mu.Lock()
		q, connected := m.qmp, m.connected
		m.mu.Unlock()
		if q != nil {
			return q, nil
		}
		select {
		case <-connected:
		case <-m.ended:
			m.mu.Lock()
			defer m.mu.Unlock()
			return nil, fmt.Errorf("pod VM %s is off: %s: %s: %w", m.id, m.exit.Reason, m.exit.Message, errdefs.ErrUnavailable)
		case <-m.d.life.Done():
			return nil, fmt.Errorf("the QEMU driver is closed: %w", errdefs.ErrUnavailable)
		case <-ctx.Done():
			return nil, fmt.Errorf("QEMU's monitor is not connected: %w", ctx.Err())
		}
	}
}

// Pauses between attempts to connect to a monitor that was lost.
const (
	minReconnect = 20 * time.Millisecond
	maxReconnect = 2 * time.Second
)

// keepMonitor holds a connection to QEMU's monitor until QEMU has ended or
// the driver is closed.
func (m *Machine) keepMonitor(adopted bool) {
	ctx, cancel := context.WithCancel(m.d.life)
	defer cancel()
	go func() {
		select {
		case <-m.gone:
			cancel()
		case <-ctx.Done():
		}
	}()
	for pause := minReconnect; ctx.Err() == nil; pause = min(2*pause, maxReconnect) {
		q, err := dialQMP(ctx, m.sockets[qmpSocket], m.onEvent)
		if err == nil {
			pause = minReconnect
			m.setMonitor(q)
			if adopted {
				m.background.Go(func() { m.resume(ctx, q) })
			}
			adopted = true // whatever comes later was running before
			select {
			case <-q.done:
			case <-ctx.Done():
				if m.d.life.Err() == nil { // QEMU is gone: read what is left
					select {
					case <-q.done:
					case <-time.After(time.Second):
					}
				}
				q.close()
			}
			m.setMonitor(nil)
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

func (m *Machine) setMonitor(q *qmpConn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.qmp = q
	m.doubtLocked()
	if q != nil {
		m.seen.watched = true
		close(m.connected)
	} else {
		m.connected = make(chan struct{})
	}
}

// doubtLocked has the next look ask QEMU whether the guest runs.
func (m *Machine) doubtLocked() { m.vouched, m.stops = time.Time{}, m.stops+1 }

// resume takes up a QEMU that ran while nobody watched: what ended is
// finished, what was launched but not started is started.
func (m *Machine) resume(ctx context.Context, q *qmpConn) {
	var s struct {
		Status string `json:"status"`
	}
	if err := q.run(ctx, "query-status", nil, &s); err != nil {
		return
	}
	m.mu.Lock()
	exited := m.exit != nil
	stopping := m.seen.stopAsked
	m.mu.Unlock()
	switch s.Status {
	case "prelaunch":
		if stopping {
			break
		}
		m.log.Info("launch of an earlier process is finished")
		m.mu.Lock()
		m.proc.Cgroups = m.d.account(m.launched, m.proc.PID, m.overhead())
		err := m.dir.write(processFile, m.proc)
		m.mu.Unlock()
		if err != nil {
			m.log.Warn("process cannot be recorded", "err", err)
		}
		if err := q.run(ctx, "cont", nil, nil); err != nil {
			m.log.Error("pod VM cannot be started", "err", err)
		}
	case "shutdown":
		m.note(func(e *evidence) { e.foundOff = true })
		m.guestEnded()
		return
	case "guest-panicked":
		m.note(func(e *evidence) { e.panicked = true })
		m.guestEnded()
		return
	case "internal-error":
		m.note(func(e *evidence) { e.internal = true })
		m.guestEnded()
		return
	}
	if s.Status == ioErrorState {
		m.background.Go(m.awaitRoom)
	}
	if exited { // its end is recorded, its process was not yet told
		m.guestEnded()
		return
	}
	if err := m.reconcile(ctx, q); err != nil {
		m.log.Warn("devices cannot be compared with QEMU's", "err", err)
	}
	if err := m.endLeftCopies(ctx, q); err != nil {
		m.log.Warn("copies of volumes that an earlier process began cannot be ended", "err", err)
	}
	for _, e := range m.table().Shares {
		m.watchServer(e)
	}
	if _, err := m.inspect(ctx, q); err != nil && !errors.Is(err, errQMPClosed) { // who ends needs no size
		m.log.Warn("QEMU does not tell how large the VM is", "err", err)
	}
	m.transition(vmpod.EventAnswered)
}

func (m *Machine) note(f func(*evidence)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f(&m.seen)
}

// onEvent hears what QEMU tells. It runs on the monitor's reader, so what has
// to ask QEMU something goes elsewhere.
func (m *Machine) onEvent(ev qmpEvent) {
	switch ev.Name {
	case "SHUTDOWN":
		var d struct {
			Guest  bool   `json:"guest"`
			Reason string `json:"reason"`
		}
		_ = json.Unmarshal(ev.Data, &d)
		m.note(func(e *evidence) {
			if e.shutdown == "" { // ours, telling an ended guest's QEMU to quit, is a second one
				e.shutdown, e.at = d.Reason, ev.Time
			}
		})
		if d.Guest {
			m.background.Go(m.guestEnded)
		}
	case "GUEST_PANICKED":
		m.note(func(e *evidence) { e.panicked, e.at = true, ev.Time })
		m.background.Go(m.guestEnded)
	case "STOP":
		m.mu.Lock()
		m.doubtLocked()
		m.mu.Unlock()
		m.background.Go(m.stopped)
	case "BLOCK_IO_ERROR":
		m.onDiskError(ev)
	}
}

// stopped looks why QEMU's CPUs have stopped. A shutdown and a panic have
// events of their own; what is left is KVM failing.
func (m *Machine) stopped() {
	ctx, cancel := context.WithTimeout(m.d.life, m.d.cfg.Deadline)
	defer cancel()
	q, err := m.monitor(ctx)
	if err != nil {
		return
	}
	var s struct {
		Status string `json:"status"`
	}
	if q.run(ctx, "query-status", nil, &s) != nil {
		return
	}
	switch s.Status {
	case "internal-error", "watchdog":
		m.note(func(e *evidence) { e.internal = true })
		m.guestEnded()
	case ioErrorState:
		m.background.Go(m.awaitRoom)
	}
}

// guestEnded records how the guest ended and lets its QEMU, which has kept
// the evidence until now, go. The record comes first: if we die in between,
// the next one reads it. Once QEMU is gone finish writes it again, then with
// all that the console had to say.
func (m *Machine) guestEnded() {
	m.mu.Lock()
	if m.exit == nil {
		m.record(m.gather())
	}
	m.mu.Unlock()
	if err := m.kill(); err != nil && m.d.life.Err() == nil {
		m.log.Error("QEMU of an ended guest does not go away", "err", err)
	}
}

// gather returns what is known now. The caller has mu.
func (m *Machine) gather() evidence {
	e := m.seen
	e.pid = m.proc.PID
	e.oomKills = oomKills(m.proc.Cgroups)
	e.stderr = lastLine(m.dir.file(stderrFile))
	e.consoleTail = consoleEnd(m.dir)
	if e.at.IsZero() {
		e.at = time.Now()
	}
	return e
}

// record writes exit.json and returns what it says. The caller has mu.
func (m *Machine) record(e evidence) vmpod.Exit {
	exit := classify(e)
	if err := m.dir.write(exitFile, exit); err != nil {
		m.log.Warn("exit cannot be recorded", "err", err)
	}
	return exit
}

// finish settles how the machine ended, after its process has. here says that
// it ended before our eyes.
func (m *Machine) finish(here bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !here {
		close(m.gone)
	}
	if m.exit == nil {
		e := m.gather()
		if m.child != nil {
			<-m.child.ended
			e.status = &m.child.status
		}
		if boot, err := bootID(); err == nil && boot != m.proc.BootID {
			e.hostRestarted = true
		}
		exit := m.record(e)
		m.exit = &exit
	}
	m.transitionLocked(vmpod.EventEnded)
	if m.agent != nil {
		m.agent.Conn.Close()
		m.agent = nil
	}
	if m.pidfd != nil {
		m.pidfd.Close()
	}
	close(m.ended)
	m.log.Info("pod VM ended", "reason", m.exit.Reason, "message", m.exit.Message)
}
