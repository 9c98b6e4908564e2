package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// govmm's QMP client offers a fixed list of commands and no way to send
// another: none passes a descriptor into an fdset, adds a vmdk node or sets a
// device's serial. So this is our own, which is also able to time out: its
// answers are matched by id, and one that is late is dropped.

// qmpEvent is an asynchronous message of QEMU.
type qmpEvent struct {
	Name string
	Data json.RawMessage
	Time time.Time
}

// qmpError is QEMU's refusal of a command.
type qmpError struct {
	Command string
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

func (e *qmpError) Error() string { return fmt.Sprintf("QEMU refused %s: %s", e.Command, e.Desc) }

// errQMPClosed means that QEMU, or the connection, is gone.
var errQMPClosed = errors.New("connection to QEMU's monitor is closed")

// A qmpConn is one connection to QEMU's monitor, past the negotiation.
type qmpConn struct {
	conn *net.UnixConn
	done chan struct{} // closed when the reader has ended

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan qmpReply
	watches map[chan qmpEvent][]string

	send sync.Mutex // one command's bytes and descriptors at a time
}

type qmpReply struct {
	ID     *uint64         `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *qmpError       `json:"error"`

	Event string          `json:"event"`
	Data  json.RawMessage `json:"data"`
	Stamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`

	Greeting json.RawMessage `json:"QMP"`
}

// dialQMP connects to the monitor at path and negotiates. QEMU serves one
// connection at a time: while another is open, this one waits until ctx ends.
// onEvent is called for every event, in order, by the reader; it must not
// wait for an answer of this connection.
func dialQMP(ctx context.Context, path string, onEvent func(qmpEvent)) (*qmpConn, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	q := &qmpConn{
		conn:    c.(*net.UnixConn),
		done:    make(chan struct{}),
		waiting: map[uint64]chan qmpReply{},
		watches: map[chan qmpEvent][]string{},
	}
	greeted := make(chan struct{})
	go q.read(greeted, onEvent)
	select {
	case <-greeted:
	case <-q.done:
		return nil, errQMPClosed
	case <-ctx.Done():
		q.close()
		return nil, fmt.Errorf("QEMU's monitor does not greet: %w", ctx.Err())
	}
	if err := q.run(ctx, "qmp_capabilities", nil, nil); err != nil {
		q.close()
		return nil, err
	}
	return q, nil
}

// close ends the connection and waits for the reader; QEMU goes on.
func (q *qmpConn) close() {
	q.conn.Close()
	<-q.done
}

func (q *qmpConn) read(greeted chan<- struct{}, onEvent func(qmpEvent)) {
	defer close(q.done)
	defer q.conn.Close()
	lines := bufio.NewScanner(q.conn)
	lines.Buffer(nil, 4<<20) // a bound on what a QEMU gone bad can make us hold
	for lines.Scan() {
		var m qmpReply
		if json.Unmarshal(lines.Bytes(), &m) != nil {
			return // not QMP: there is nothing to resynchronise on
		}
		switch {
		case m.Greeting != nil:
			if greeted != nil {
				close(greeted)
				greeted = nil
			}
		case m.Event != "":
			q.deliver(qmpEvent{m.Event, m.Data, time.Unix(m.Stamp.Seconds, m.Stamp.Microseconds*1000)}, onEvent)
		case m.ID != nil:
			q.mu.Lock()
			ch := q.waiting[*m.ID]
			delete(q.waiting, *m.ID)
			q.mu.Unlock()
			if ch != nil {
				ch <- m
			}
		}
	}
}

func (q *qmpConn) deliver(ev qmpEvent, onEvent func(qmpEvent)) {
	q.mu.Lock()
	for ch, names := range q.watches {
		if slices.Contains(names, ev.Name) {
			select {
			case ch <- ev:
			default: // more than one watcher can have asked for
			}
		}
	}
	q.mu.Unlock()
	if onEvent != nil {
		onEvent(ev)
	}
}

// watch returns a channel with the events of these names from now on, and how
// to end it. It holds 64; a watcher that falls behind by more loses some.
func (q *qmpConn) watch(names ...string) (<-chan qmpEvent, func()) {
	ch := make(chan qmpEvent, 64)
	q.mu.Lock()
	q.watches[ch] = names
	q.mu.Unlock()
	return ch, func() {
		q.mu.Lock()
		delete(q.watches, ch)
		q.mu.Unlock()
	}
}

// run executes one command. args is anything that marshals to a JSON object,
// or nil; the answer is decoded into out unless that is nil; files go along
// as descriptors. It returns a *qmpError, errQMPClosed or ctx's error.
func (q *qmpConn) run(ctx context.Context, command string, args, out any, files ...*os.File) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	ch := make(chan qmpReply, 1)
	q.mu.Lock()
	q.next++
	id := q.next
	q.waiting[id] = ch
	q.mu.Unlock()
	defer func() {
		q.mu.Lock()
		delete(q.waiting, id)
		q.mu.Unlock()
	}()

	if err := q.write(ctx, id, command, args, files); err != nil {
		return err
	}
	var m qmpReply
	select {
	case m = <-ch:
	case <-ctx.Done():
		return fmt.Errorf("QEMU does not answer %s: %w", command, ctx.Err())
	case <-q.done:
		select {
		case m = <-ch: // the answer came before the end
		default:
			return errQMPClosed
		}
	}
	if m.Error != nil {
		m.Error.Command = command
		return m.Error
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(m.Return, out)
}

func (q *qmpConn) write(ctx context.Context, id uint64, command string, args any, files []*os.File) error {
	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return err
	}
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		oob = unix.UnixRights(fds...)
	}
	q.send.Lock()
	defer q.send.Unlock()
	deadline, _ := ctx.Deadline() // zero: none
	q.conn.SetWriteDeadline(deadline)
	n, _, err := q.conn.WriteMsgUnix(append(b, '\n'), oob, nil)
	if err == nil && n <= len(b) {
		// A stream socket may take less; the rest needs no descriptors.
		_, err = q.conn.Write(append(b, '\n')[n:])
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		q.conn.Close() // half a command may be out: this connection is of no use
		return fmt.Errorf("QEMU does not read %s: %w", command, context.DeadlineExceeded)
	}
	if err != nil {
		return fmt.Errorf("%w (%v)", errQMPClosed, err)
	}
	return nil
}
