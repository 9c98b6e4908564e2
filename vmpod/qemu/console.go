package qemu

import (
	"context"
	"io"
	"net"
	"os"
	"strings"
	"time"
)

// copyConsole writes what comes from the guest's serial console into
// console.log until QEMU ends or ctx does. QEMU drops what the guest prints
// while nobody is connected, so a guest cannot fill the host's disk.
func (m *Machine) copyConsole(ctx context.Context) {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", m.sockets[consoleSocket])
	if err != nil {
		return // QEMU is gone already
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	// A second driver's connection would wait for ever behind ours, and a
	// dead QEMU's socket is closed: so this ends.
	go func() {
		select {
		case <-m.gone:
			c.SetReadDeadline(time.Now().Add(time.Second))
		case <-ctx.Done():
		}
	}()
	log := &boundedLog{path: m.dir.file(consoleFile), limit: m.d.cfg.ConsoleLimit}
	defer log.close()
	buf := make([]byte, 4096)
	for failed := false; ; {
		n, err := c.Read(buf)
		if n > 0 {
			// The guest must not wait for a host's disk that is full: what
			// does not fit is lost, what comes later may fit again.
			_, werr := log.Write(buf[:n])
			if werr != nil && !failed {
				m.log.Warn("console cannot be recorded for now", "err", werr)
			}
			failed = werr != nil
		}
		if err != nil {
			return
		}
	}
}

// A boundedLog is a file and its predecessor, each of about limit bytes.
type boundedLog struct {
	path  string
	limit int64

	f    *os.File
	size int64
}

func (l *boundedLog) Write(b []byte) (int, error) {
	if l.f == nil || l.size >= l.limit {
		if err := l.rotate(); err != nil {
			return 0, err
		}
	}
	n, err := l.f.Write(b)
	l.size += int64(n)
	return n, err
}

func (l *boundedLog) rotate() error {
	if l.f != nil {
		l.f.Close()
		l.f = nil
		if err := os.Rename(l.path, l.path+".1"); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	l.f, l.size = f, st.Size()
	return nil
}

func (l *boundedLog) close() {
	if l.f != nil {
		l.f.Close()
	}
}

// consoleEnd returns the last lines of a VM's console, printable.
func consoleEnd(dir vmDir) string {
	const tail = 4096
	f, err := os.Open(dir.file(consoleFile))
	if err != nil {
		return ""
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return ""
	}
	b := make([]byte, min(size, tail))
	n, _ := f.ReadAt(b, size-int64(len(b)))
	return strings.Map(func(r rune) rune {
		if r != '\n' && (r < ' ' || r == 0x7f || r == 0xfffd) {
			return -1
		}
		return r
	}, string(b[:n]))
}
