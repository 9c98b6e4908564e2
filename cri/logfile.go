package cri

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// A logCursor says: records up to Offset are in the file Inode, which had Size
// bytes then. Every record is one line, so after a crash the lines behind
// Size tell how many more had been written: nothing is lost, nothing doubled.
type logCursor struct {
	Offset uint64 `json:"offset"`
	Inode  uint64 `json:"inode"`
	Size   int64  `json:"size"`
	// Done is set when the container's log has ended.
	Done bool `json:"done,omitempty"`
}

// A logFile writes one container's log in CRI's format. It is used by one
// goroutine at a time.
type logFile struct {
	path  string
	f     *os.File
	inode uint64
	size  int64
	buf   []byte
}

// logTime is RFC3339Nano with all digits: lines stay aligned, and sort.
const logTime = "2006-01-02T15:04:05.000000000Z07:00"

// openLog opens or makes the file, for appending. Neither the file nor the
// directory it lies in may be a symbolic link; guests and pods have no say in
// either, but log paths have been attacked elsewhere (CVE-2021-25741).
func openLog(path string) (*logFile, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	d, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_PATH, 0)
	if err != nil {
		return nil, fmt.Errorf("log directory %s: %w", dir, err)
	}
	defer unix.Close(d)
	fd, err := unix.Openat(d, filepath.Base(path), unix.O_RDWR|unix.O_CREAT|unix.O_APPEND|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o640)
	if err != nil {
		return nil, fmt.Errorf("log file %s: %w", path, err)
	}
	l := &logFile{path: path, f: os.NewFile(uintptr(fd), path)}
	fi, err := l.f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = fmt.Errorf("log file %s: not a regular file", path)
	}
	if err != nil {
		l.f.Close()
		return nil, err
	}
	l.inode, l.size = inodeOf(fi), fi.Size()
	return l, nil
}

func inodeOf(fi fs.FileInfo) uint64 {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st.Ino
	}
	return 0
}

// add buffers one record.
func (l *logFile) add(rec *agentapi.LogRecord) {
	l.buf = time.Unix(0, rec.TimeNs).UTC().AppendFormat(l.buf, logTime)
	if rec.Stream == agentapi.LogRecord_STDERR {
		l.buf = append(l.buf, " stderr "...)
	} else {
		l.buf = append(l.buf, " stdout "...)
	}
	if rec.Partial {
		l.buf = append(l.buf, "P "...)
	} else {
		l.buf = append(l.buf, "F "...)
	}
	at := len(l.buf)
	l.buf = append(l.buf, rec.Line...)
	for line := l.buf[at:]; ; { // a record is one line, whatever a guest says
		i := bytes.IndexByte(line, '\n')
		if i < 0 {
			break
		}
		line[i] = ' '
		line = line[i+1:]
	}
	l.buf = append(l.buf, '\n')
}

// flush writes what is buffered, all or nothing: after a failure (a full
// disk) the file ends where it ended, and flush may be called again.
func (l *logFile) flush() error {
	if len(l.buf) == 0 {
		return nil
	}
	if _, err := l.f.Write(l.buf); err != nil {
		return errors.Join(err, l.f.Truncate(l.size))
	}
	l.size += int64(len(l.buf))
	l.buf = l.buf[:0]
	return nil
}

func (l *logFile) cursor(offset uint64) logCursor {
	return logCursor{Offset: offset, Inode: l.inode, Size: l.size}
}

func (l *logFile) close() error { return l.f.Close() }

// written returns the offset of the last record that reached the disk, given
// the last cursor, and mends a torn last line. The file may have been renamed
// by a rotation that the crash cut short.
func written(path string, c logCursor) (uint64, error) {
	name, err := findInode(path, c.Inode)
	if err != nil || name == "" {
		return c.Offset, err
	}
	f, err := os.OpenFile(name, os.O_RDWR|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return c.Offset, err
	}
	defer f.Close()
	if _, err := f.Seek(c.Size, io.SeekStart); err != nil {
		return c.Offset, err
	}
	n, end := uint64(0), c.Size
	r := bufio.NewReaderSize(f, 64<<10)
	for {
		line, err := readLine(r)
		if err == io.EOF {
			break
		}
		if err != nil {
			return c.Offset, err
		}
		n, end = n+1, end+line
	}
	if fi, err := f.Stat(); err == nil && fi.Size() > end {
		if err := f.Truncate(end); err != nil {
			return c.Offset, err
		}
	}
	return c.Offset + n, nil
}

// readLine skips one whole line and returns its length; io.EOF when there is
// none.
func readLine(r *bufio.Reader) (int64, error) {
	var n int64
	for {
		part, err := r.ReadSlice('\n')
		n += int64(len(part))
		if err != bufio.ErrBufferFull {
			return n, err
		}
	}
}

// findInode finds the file that has the inode: path itself, or a neighbour
// that a rotation has renamed it to. "" if there is none.
func findInode(path string, inode uint64) (string, error) {
	if fi, err := os.Lstat(path); err == nil && fi.Mode().IsRegular() && inodeOf(fi) == inode {
		return path, nil
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		if fi, err := e.Info(); err == nil && fi.Mode().IsRegular() && inodeOf(fi) == inode {
			return filepath.Join(filepath.Dir(path), e.Name()), nil
		}
	}
	return "", nil
}
