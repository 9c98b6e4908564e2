package cri

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

const (
	// logBatch is how much is collected before it is written in one go.
	logBatch = 64 << 10
	// logLinger is how long records wait for company when the guest pauses.
	logLinger = 5 * time.Millisecond
	// cursorEvery bounds how many bytes a restart has to count again.
	cursorEvery = 4 << 20
	// ackLinger is how long acknowledgements are collected.
	ackLinger = 250 * time.Millisecond
)

// A logPump moves one container's log from the guest's journal to its file:
// read, written, then acknowledged, in that order.
type logPump struct {
	pod  *pod
	id   string
	path string // "" discards the log
	done chan struct{}
	stop context.CancelFunc

	mu     sync.Mutex // guards file and offset against reopen
	file   *logFile
	offset uint64 // last record written
	saved  int64  // file size at the last saved cursor
}

func (x *process) logPump() *logPump {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.pump
}

// startLog begins, or resumes after a restart, the log of a container. The
// file exists when it returns.
func (p *pod) startLog(c *container) error {
	x := p.process(c.ID)
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.pump != nil {
		return nil
	}
	l := &logPump{pod: p, id: c.ID, path: c.LogPath, done: make(chan struct{})}
	cur, err := p.s.store.cursor(c.ID)
	if err != nil {
		return err
	}
	if cur.Done {
		return nil
	}
	l.offset = cur.Offset
	if l.path != "" {
		if cur.Inode != 0 {
			if l.offset, err = written(l.path, cur); err != nil {
				return err
			}
		}
		if err := l.open(); err != nil {
			return err
		}
	}
	var ctx context.Context
	ctx, l.stop = context.WithCancel(p.ctx)
	if !p.spawn(func() { l.run(ctx) }) {
		l.stop()
		if l.file != nil {
			_ = l.file.close()
		}
		return fmt.Errorf("sandbox %s was stopped: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	x.pump = l
	return nil
}

// open opens the file and saves a cursor for it; mu is held or not yet needed.
func (l *logPump) open() error {
	f, err := openLog(l.path)
	if err != nil {
		return err
	}
	l.file = f
	return l.save(false)
}

func (l *logPump) save(done bool) error {
	c := logCursor{Offset: l.offset, Done: done}
	if l.file != nil {
		c = l.file.cursor(l.offset)
		c.Done = done
		l.saved = l.file.size
	}
	return l.pod.s.store.setCursor(l.id, c)
}

// reopen serves a rotation: the kubelet has renamed the file.
func (l *logPump) reopen() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.path == "" {
		return nil
	}
	old := l.file
	if err := l.open(); err != nil {
		if l.file != nil && l.file != old {
			_ = l.file.close()
		}
		l.file = old
		return fmt.Errorf("reopen the log: %w", err)
	}
	if old != nil {
		l.file.buf = append(l.file.buf, old.buf...)
		_ = old.close()
	}
	return nil
}

// drain waits until the log is complete or ctx ends: a process that the
// container left behind may hold its output open.
func (l *logPump) drain(ctx context.Context) {
	select {
	case <-l.done:
	case <-ctx.Done():
	}
}

// run follows the journal, session after session, until the log has ended.
func (l *logPump) run(ctx context.Context) {
	acks := newAcker(l)
	defer acks.close()
	defer close(l.done)
	ended := false
	for !ended && ctx.Err() == nil {
		c, err := l.pod.link.session(ctx)
		if err != nil {
			break
		}
		if ended, err = l.follow(ctx, c, acks); ended || ctx.Err() != nil || c.Err() != nil {
			continue
		}
		if errdefs.IsNotFound(err) {
			break // the container is gone from the guest
		}
		// The session lasts but the stream does not: a guest that errs, or
		// wants to keep the host busy.
		l.pod.log.Warn("a container's log ended early, trying again", "container", l.id, "err", err)
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.save(ended); err != nil && ctx.Err() == nil {
		l.pod.log.Warn("noting a log's position failed", "container", l.id, "err", err)
	}
	if l.file != nil {
		_ = l.file.close()
		l.file = nil
	}
}

// follow reads one session's stream. Records are collected while more come at
// once, so that a busy log costs few writes.
func (l *logPump) follow(ctx context.Context, c *agentapi.Client, acks *acker) (ended bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type item struct {
		rec *agentapi.LogRecord
		err error
	}
	items := make(chan item, 256)
	l.mu.Lock()
	from := l.offset + 1
	if l.file != nil {
		l.file.buf = l.file.buf[:0] // of a session that broke: it comes again
	}
	l.mu.Unlock()
	go func() {
		defer close(items)
		for rec, err := range c.Logs(ctx, l.id, from) {
			select {
			case items <- item{rec, err}:
			case <-ctx.Done():
				return
			}
		}
	}()
	linger := time.NewTimer(time.Hour)
	defer linger.Stop()
	var last uint64 // last record buffered, 0 when nothing is
	flush := func() error {
		if last == 0 {
			return nil
		}
		err := l.commit(ctx, last)
		if err == nil {
			acks.to(last)
			last = 0
		}
		return err
	}
	for {
		select {
		case it, ok := <-items:
			if !ok || it.err != nil {
				return ended, firstErr(it.err, flush())
			}
			if it.rec.Offset == 0 {
				return false, errors.New("the guest sent a record without an offset")
			}
			if it.rec.Offset <= max(last, l.written()) {
				continue
			}
			first := last == 0
			last = it.rec.Offset
			ended = ended || it.rec.Eof
			if size := l.buffer(it.rec); size < logBatch && !it.rec.Eof {
				if first { // what follows does not make it wait longer
					linger.Reset(logLinger)
				}
				continue
			}
		case <-linger.C:
		case <-ctx.Done():
			return ended, flush()
		}
		if err := flush(); err != nil {
			return false, err
		}
		if ended {
			return true, nil
		}
	}
}

func firstErr(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (l *logPump) written() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.offset
}

func (l *logPump) buffer(rec *agentapi.LogRecord) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return logBatch
	}
	if !rec.Eof {
		l.file.add(rec)
	}
	return len(l.file.buf)
}

// commit writes what is buffered. A full disk is waited for: the guest keeps
// the records meanwhile.
func (l *logPump) commit(ctx context.Context, upTo uint64) error {
	for warned := false; ; {
		l.mu.Lock()
		var err error
		if l.file != nil {
			err = l.file.flush()
		}
		if err == nil {
			l.offset = upTo
			if l.file != nil && l.file.size-l.saved > cursorEvery {
				err = l.save(false)
			}
			l.mu.Unlock()
			return err
		}
		l.mu.Unlock()
		if !warned {
			warned = true
			l.pod.log.Error("writing a container's log failed; it waits until the disk takes it", "container", l.id, "path", l.path, "err", err)
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return err
		}
	}
}

// An acker acknowledges a log's records behind their writing, a few times a
// second at most, without holding the writing up.
type acker struct {
	l    *logPump
	mu   sync.Mutex
	upTo uint64
	wake chan struct{}
	done chan struct{}
}

func newAcker(l *logPump) *acker {
	a := &acker{l: l, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go a.run()
	return a
}

func (a *acker) to(offset uint64) {
	a.mu.Lock()
	a.upTo = offset
	a.mu.Unlock()
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

func (a *acker) close() {
	close(a.wake)
	<-a.done
}

func (a *acker) run() {
	defer close(a.done)
	for open := true; open; {
		_, open = <-a.wake
		if open {
			select { // collect
			case <-time.After(ackLinger):
			case <-a.l.pod.ctx.Done():
				return
			}
		}
		a.mu.Lock()
		upTo := a.upTo
		a.upTo = 0
		a.mu.Unlock()
		if upTo > 0 && a.l.pod.ctx.Err() == nil {
			a.l.pod.acknowledge(&agentapi.AcknowledgeRequest{ContainerId: a.l.id, Logs: upTo})
		}
	}
}

// reopenLog writes on into a new file after a rotation.
func (s *Server) reopenLog(c *container) error {
	p := s.livePod(c.SandboxID)
	if p == nil {
		return fmt.Errorf("container %s is not running: %w", c.ID, errdefs.ErrFailedPrecondition)
	}
	pump := p.process(c.ID).logPump()
	if pump == nil {
		return fmt.Errorf("container %s has no log under way: %w", c.ID, errdefs.ErrFailedPrecondition)
	}
	select {
	case <-pump.done:
		return fmt.Errorf("the log of container %s has ended: %w", c.ID, errdefs.ErrFailedPrecondition)
	default:
	}
	return pump.reopen()
}
