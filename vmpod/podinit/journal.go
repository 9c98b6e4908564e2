package podinit

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

const (
	// maxUnacked is what a container's journal holds that the host has not
	// acknowledged; then its writer waits, and so does the container's pipe.
	maxUnacked = 32 << 20
	// segmentSize is how large one file of a journal grows; whole files are
	// dropped when all in them is acknowledged.
	segmentSize = 1 << 20
	// spareSize is how large a segment in memory grows, while the pod's disk
	// takes nothing. There are two at most; then the writer waits for the host.
	spareSize = 128 << 10
)

// A logJournal is the output of one container: LogRecords in files, counted
// from 1, kept until they are acknowledged. One goroutine appends; any number
// read. It lives and ends with the machine, so it is never synced to disk.
type logJournal struct {
	dir   string
	limit int64 // bytes that may wait for acknowledgement
	segsz int64

	writing  sync.Mutex // one writer at a time: its numbers are not yet taken
	mu       sync.Mutex
	segments []*segment // oldest first; the last one grows
	next     uint64     // offset of the next record
	acked    uint64
	bytes    int64
	eof      bool
	closed   bool
	changed  chan struct{} // closed and replaced at every change
}

type segment struct {
	f     *os.File
	first uint64
	last  uint64 // 0: empty
	size  int64
	refs  int // readers in it; the file is closed with the last one
	gone  bool
	spare bool // in memory, because the disk is full
}

func newLogJournal(dir string) (*logJournal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return &logJournal{dir: dir, limit: maxUnacked, segsz: segmentSize, next: 1, changed: make(chan struct{})}, nil
}

// append numbers the records and writes them in one go. It waits while too
// much is unacknowledged, unless the journal is closed.
func (j *logJournal) append(records ...*agentapi.LogRecord) error {
	j.writing.Lock() // also while mu is given up to wait
	defer j.writing.Unlock()
	j.mu.Lock()
	defer j.mu.Unlock()
	for j.bytes >= j.limit && !j.closed {
		j.wait()
	}
	if j.closed {
		return os.ErrClosed
	}
	var buf []byte
	first, next, eof := j.next, j.next, j.eof
	for _, rec := range records {
		rec.Offset = next
		next++
		eof = eof || rec.Eof
		at := len(buf)
		buf = append(buf, 0, 0, 0, 0)
		var err error
		if buf, err = (proto.MarshalOptions{}).MarshalAppend(buf, rec); err != nil {
			return err
		}
		binary.BigEndian.PutUint32(buf[at:], uint32(len(buf)-at-4))
	}
	seg, err := j.write(first, buf)
	if err != nil {
		return err
	}
	// Only now, so that a segment's records are numbered without a gap.
	j.next, j.eof = next, eof
	seg.size += int64(len(buf))
	seg.last = next - 1
	j.bytes += int64(len(buf))
	j.wake()
	return nil
}

// write puts buf behind what is there: on the pod's disk or, if the pod has
// filled that, in memory. It returns the segment, whose size does not yet
// count buf.
func (j *logJournal) write(first uint64, buf []byte) (*segment, error) {
	seg, err := j.tail(first)
	if err == nil {
		if _, err = seg.f.WriteAt(buf, seg.size); err == nil {
			return seg, nil
		}
		if seg.size == 0 {
			seg.f.Close()
			j.segments = j.segments[:len(j.segments)-1]
		}
	}
	if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EIO) {
		return nil, fmt.Errorf("log journal: %w", err)
	}
	for !j.closed && j.spareBytes()+int64(len(buf)) > spareSize+agentapi.MaxMessage {
		j.wait()
	}
	if j.closed {
		return nil, os.ErrClosed
	}
	fd, err := unix.MemfdCreate("log", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("log journal: %w", err)
	}
	seg = &segment{f: os.NewFile(uintptr(fd), "log"), first: first, spare: true}
	j.segments = append(j.segments, seg)
	_, err = seg.f.WriteAt(buf, 0)
	return seg, err
}

func (j *logJournal) spareBytes() (n int64) {
	for _, s := range j.segments {
		if s.spare {
			n += s.size
		}
	}
	return n
}

// wait lets go of mu until something has changed.
func (j *logJournal) wait() {
	c := j.changed
	j.mu.Unlock()
	<-c
	j.mu.Lock()
}

// tail returns the segment to write to, a new one if the last is full.
func (j *logJournal) tail(first uint64) (*segment, error) {
	if n := len(j.segments); n > 0 && j.segments[n-1].size < j.segsz && (!j.segments[n-1].spare || j.segments[n-1].size < spareSize) {
		return j.segments[n-1], nil
	}
	f, err := os.OpenFile(filepath.Join(j.dir, strconv.FormatUint(first, 10)), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("log journal: %w", err)
	}
	os.Remove(f.Name()) // it is ours alone, and its space goes with us
	s := &segment{f: f, first: first}
	j.segments = append(j.segments, s)
	return s, nil
}

func (j *logJournal) wake() {
	close(j.changed)
	j.changed = make(chan struct{})
}

// ack drops the segments that hold nothing behind offset.
func (j *logJournal) ack(offset uint64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if offset <= j.acked {
		return
	}
	j.acked = min(offset, j.next-1)
	for len(j.segments) > 0 && j.segments[0].last <= j.acked {
		s := j.segments[0]
		if len(j.segments) == 1 && s.size < j.segsz && !s.spare {
			break // it still grows
		}
		j.drop(s)
		j.segments = j.segments[1:]
	}
	j.wake()
}

func (j *logJournal) drop(s *segment) {
	j.bytes -= s.size
	s.gone = true
	if s.refs == 0 {
		s.f.Close()
	}
}

// close frees the files; readers and the writer end.
func (j *logJournal) close() {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed {
		return
	}
	j.closed = true
	for _, s := range j.segments {
		j.drop(s)
	}
	j.segments = nil
	j.wake()
}

// follow calls each with every record from an offset on (0: the oldest kept),
// as they come, and idle before it waits for more, until the one with eof, or
// until stop is closed. A record is given as it lies in the file, which is as
// it travels: its length, then itself; several may come in one call. An offset
// that is already dropped is ErrOutOfRange; the oldest one kept is in it.
func (j *logJournal) follow(from uint64, stop <-chan struct{}, each func(frames []byte) error, idle func() error) error {
	var at logPlace
	defer func() { j.release(at.seg) }()
	buf := make([]byte, readAhead)
	for {
		size, wait, err := j.locate(&at, from)
		if err != nil {
			return err
		}
		if wait != nil {
			if err := idle(); err != nil {
				return err
			}
			select {
			case <-wait:
				continue
			case <-stop:
				return nil
			}
		}
		n, err := at.seg.f.ReadAt(buf[:min(int64(len(buf)), size-at.pos)], at.pos)
		if err != nil {
			return fmt.Errorf("log journal: %w", err)
		}
		skip, used := at.count(buf[:n], from)
		if used == 0 {
			return fmt.Errorf("log journal: a record of more than %d bytes: %w", readAhead, errdefs.ErrInternal)
		}
		if skip < used {
			if err := each(buf[skip:used]); err != nil {
				return err
			}
			from = at.next
		}
		if j.over(at.next) {
			return idle()
		}
	}
}

// readAhead holds any record: a line of agentapi.MaxLine and what is about it.
const readAhead = 64 << 10

// A logPlace is where a reader of a journal is.
type logPlace struct {
	seg  *segment
	pos  int64  // in the file
	next uint64 // offset of the record there
}

// count moves the place over the whole records in b, which was read there, and
// returns where in b those from an offset on begin, and where the last ends.
func (p *logPlace) count(b []byte, from uint64) (skip, used int) {
	for len(b)-used >= 4 {
		n := 4 + int(binary.BigEndian.Uint32(b[used:]))
		if n > len(b)-used {
			break
		}
		used += n
		if p.next < from {
			skip = used
		}
		p.next++
	}
	p.pos += int64(used)
	return skip, used
}

// over says whether the log has ended and next is behind its end.
func (j *logJournal) over(next uint64) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.eof && next >= j.next
}

// locate moves at to where the next record is to be read and returns the size
// of its segment now, or a channel to wait on.
func (j *logJournal) locate(at *logPlace, from uint64) (int64, <-chan struct{}, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed {
		return 0, nil, fmt.Errorf("the container was removed: %w", errdefs.ErrNotFound)
	}
	if at.seg != nil && at.pos < at.seg.size {
		return at.seg.size, nil, nil
	}
	for _, s := range j.segments {
		if s == at.seg || s.last < from && from != 0 || s.size == 0 {
			continue
		}
		if s.first > from && from != 0 {
			return 0, nil, fmt.Errorf("log record %d is gone, the oldest kept is %d: %w", from, s.first, errdefs.ErrOutOfRange)
		}
		j.releaseLocked(at.seg)
		s.refs++
		*at = logPlace{seg: s, next: s.first}
		return s.size, nil, nil
	}
	if from != 0 && at.seg == nil && from <= j.acked && from < j.next {
		return 0, nil, fmt.Errorf("log record %d is gone, the next is %d: %w", from, j.next, errdefs.ErrOutOfRange)
	}
	return 0, j.changed, nil
}

func (j *logJournal) release(s *segment) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.releaseLocked(s)
}

func (j *logJournal) releaseLocked(s *segment) {
	if s == nil {
		return
	}
	s.refs--
	if s.refs == 0 && s.gone {
		s.f.Close()
	}
}
