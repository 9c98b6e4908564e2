package podinit

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
)

var errStdinClosed = errors.New("stdin is closed")

// attachPatience is how long an attached host may take nothing before it is
// cut off, so that the container need not wait for it.
const attachPatience = 10 * time.Second

// stdio is what a process reads and writes: pipes, or a terminal's master.
type stdio struct {
	tty       bool
	stdinEnds bool // the end of a STDIN stream is the end of stdin
	wantIn    bool // it is to have a stdin

	mu       sync.Mutex
	in       *os.File // write end, nil: none or closed
	out, err *os.File // read ends; with a terminal out is the master
	taken    [2]bool  // exec's outputs that a stream has
	subs     [2]map[*subscriber]bool
	ended    [2]bool
	size     *unix.Winsize // asked for before the terminal was there
}

// A subscriber is one attached host.
type subscriber struct {
	c    chan []byte
	once sync.Once
	cut  chan struct{}
}

func (s *stdio) terminal() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tty
}

func (s *stdio) hasStdin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.in != nil
}

func (s *stdio) closeStdin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.in == nil {
		return
	}
	if s.tty {
		// A terminal has no end of input; its end-of-file character says it.
		_, _ = s.in.Write([]byte{4})
	} else {
		s.in.Close()
	}
	s.in = nil
}

// stdinWriter writes to whatever stdin is now.
type stdinWriter struct{ s *stdio }

func (w stdinWriter) Write(p []byte) (int, error) {
	w.s.mu.Lock()
	f := w.s.in
	w.s.mu.Unlock()
	if f == nil {
		return 0, errStdinClosed
	}
	n, err := f.Write(p)
	if err != nil {
		err = errStdinClosed // the process closed it, or is gone
	}
	return n, err
}

// takeOutput gives one of an exec's outputs to the one stream that reads it.
func (s *stdio) takeOutput(stderr bool) (*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, f := 0, s.out
	if stderr {
		i, f = 1, s.err
	}
	if f == nil || s.taken[i] {
		return nil, fmt.Errorf("its output is being read or was read already: %w", errdefs.ErrFailedPrecondition)
	}
	s.taken[i] = true
	return f, nil
}

// resize sets the terminal's size, now or as soon as there is one.
func (s *stdio) resize(width, height uint32) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.tty {
		return fmt.Errorf("it has no terminal: %w", errdefs.ErrFailedPrecondition)
	}
	s.size = &unix.Winsize{Col: uint16(min(width, 0xffff)), Row: uint16(min(height, 0xffff))}
	return s.applySize()
}

func (s *stdio) applySize() error {
	if s.size == nil || s.out == nil {
		return nil
	}
	raw, err := s.out.SyscallConn()
	if err != nil {
		return err
	}
	var ierr error
	if err := raw.Control(func(fd uintptr) { ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, s.size) }); err != nil {
		return err
	}
	return ierr
}

// open makes our ends and returns the child's three files.
func (s *stdio) open(tty, stdin bool) (child [3]*os.File, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tty, s.wantIn = tty, stdin
	defer func() {
		if err != nil {
			closeAll(child[:])
			closeAll([]*os.File{s.in, s.out, s.err})
			s.in, s.out, s.err = nil, nil, nil
		}
	}()
	if child[0], err = os.OpenFile(os.DevNull, os.O_RDWR, 0); err != nil {
		return child, err
	}
	if tty {
		child[1], child[2] = child[0], child[0]
		return child, nil
	}
	if stdin {
		child[0].Close()
		if child[0], s.in, err = os.Pipe(); err != nil {
			return child, err
		}
	}
	if s.out, child[1], err = os.Pipe(); err != nil {
		return child, err
	}
	s.err, child[2], err = os.Pipe()
	return child, err
}

// setTerminal takes the master that crun sent.
func (s *stdio) setTerminal(master *os.File) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.out = master
	if s.wantIn {
		s.in = master
	}
	return s.applySize()
}

// close frees what the process's end leaves.
func (s *stdio) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range []*os.File{s.in, s.out, s.err} {
		if f != nil {
			f.Close()
		}
	}
	s.in = nil
}

// endOfTerminal makes io.EOF of EIO, which is what a master reads when nobody
// has the terminal open any more.
type endOfTerminal struct{ f *os.File }

func (r endOfTerminal) Read(p []byte) (int, error) {
	n, err := r.f.Read(p)
	if err != nil && (errors.Is(err, unix.EIO) || errors.Is(err, os.ErrClosed)) {
		err = io.EOF
	}
	return n, err
}

// journal reads a container's outputs until they end, into its log and to
// whoever is attached, and marks the end of the log.
func (s *stdio) journal(j *logJournal) {
	var wg sync.WaitGroup
	pump := func(i int, f *os.File, stream agentapi.LogRecord_Stream) {
		defer wg.Done()
		split := &lineSplitter{stream: stream}
		buf := make([]byte, 64<<10)
		r := endOfTerminal{f}
		for {
			n, err := r.Read(buf)
			if n > 0 {
				if records := split.split(buf[:n], time.Now().UnixNano()); len(records) > 0 {
					_ = j.append(records...)
				}
				s.publish(i, buf[:n])
			}
			if err != nil {
				break
			}
		}
		if records := split.rest(time.Now().UnixNano()); len(records) > 0 {
			_ = j.append(records...)
		}
		s.endOutput(i)
	}
	s.mu.Lock()
	out, errf := s.out, s.err
	s.mu.Unlock()
	wg.Add(1)
	go pump(0, out, agentapi.LogRecord_STDOUT)
	if errf != nil {
		wg.Add(1)
		go pump(1, errf, agentapi.LogRecord_STDERR)
	} else {
		s.endOutput(1)
	}
	wg.Wait()
	_ = j.append(&agentapi.LogRecord{TimeNs: time.Now().UnixNano(), Eof: true})
}

// publish hands output to every attached host; one that takes nothing for
// too long is cut off.
func (s *stdio) publish(i int, p []byte) {
	s.mu.Lock()
	subs := make([]*subscriber, 0, len(s.subs[i]))
	for sub := range s.subs[i] {
		subs = append(subs, sub)
	}
	s.mu.Unlock()
	if len(subs) == 0 {
		return
	}
	p = append([]byte(nil), p...)
	for _, sub := range subs {
		select {
		case sub.c <- p:
			continue
		case <-sub.cut:
			continue
		default:
		}
		t := time.NewTimer(attachPatience)
		select {
		case sub.c <- p:
		case <-sub.cut:
		case <-t.C:
			s.unsubscribe(i, sub)
		}
		t.Stop()
	}
}

func (s *stdio) subscribe(i int) *subscriber {
	sub := &subscriber{c: make(chan []byte, 16), cut: make(chan struct{})}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended[i] {
		close(sub.c)
		return sub
	}
	if s.subs[i] == nil {
		s.subs[i] = map[*subscriber]bool{}
	}
	s.subs[i][sub] = true
	return sub
}

func (s *stdio) unsubscribe(i int, sub *subscriber) {
	s.mu.Lock()
	delete(s.subs[i], sub)
	s.mu.Unlock()
	sub.once.Do(func() { close(sub.cut) })
}

// endOutput is called by the pump of output i, the only publisher on it.
func (s *stdio) endOutput(i int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended[i] = true
	for sub := range s.subs[i] {
		close(sub.c)
	}
	s.subs[i] = nil
}

// attach streams a container's output from now on.
func (s *stdio) attach(stderr bool, to *agentapi.Stream) error {
	i := 0
	if stderr {
		i = 1
	}
	sub := s.subscribe(i)
	defer s.unsubscribe(i, sub)
	if err := to.Accept(); err != nil {
		return nil
	}
	gone := to.Gone()
	for {
		select {
		case p, ok := <-sub.c:
			if !ok {
				return quiet(to.CloseWrite())
			}
			if _, err := to.Write(p); err != nil {
				return quiet(err)
			}
		case <-sub.cut:
			return fmt.Errorf("an attached host took nothing for %v and was cut off: %w", attachPatience, errdefs.ErrAborted)
		case <-gone:
			return nil
		}
	}
}
