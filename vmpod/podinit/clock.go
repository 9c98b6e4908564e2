package podinit

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
)

// maxSlew is the largest error of the clock that is worked off little by
// little (the kernel does 0.5 ms a second); what is larger is set right at
// once, as ntpd does.
const maxSlew = 128 * time.Millisecond

// A hostClock keeps the wall clock by the host's. It has no timer: it looks
// whenever the host says hello.
type hostClock struct {
	mu sync.Mutex
	// seen is host_ns of the last reading: a call may be repeated.
	seen int64
	// host reads the difference to the host's clock where the guest can see
	// that; ok is false where it cannot.
	host func() (ahead time.Duration, ok bool)
	// adjust sets the clock forward, or back.
	adjust func(by time.Duration) error
}

func newHostClock() *hostClock { return &hostClock{host: readPTP, adjust: adjustClock} }

// set steps the clock: the host's was ns at the time arrived, which is counted
// from by the monotonic clock.
func (c *hostClock) set(ns int64, arrived time.Time) error {
	if ns < 0 {
		return fmt.Errorf("clock_ns is %d: want the wall clock in nanoseconds since the epoch: %w", ns, errdefs.ErrInvalidArgument)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	ts := unix.NsecToTimespec(ns + int64(time.Since(arrived)))
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("set the clock: %w", err)
	}
	_, err := c.follow()
	return err
}

// keep corrects the clock by the host's, or by what the host has found wrong.
func (c *hostClock) keep(r *agentapi.ClockReading) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if done, err := c.follow(); done {
		return err
	}
	if r == nil || r.HostNs == c.seen {
		return nil
	}
	c.seen = r.HostNs
	return c.adjust(time.Duration(r.HostNs - r.GuestNs))
}

// ptpNoise is what two readings of the host's clock may differ by.
const ptpNoise = 100 * time.Microsecond

// follow corrects the clock by the host's where that can be read, which is
// tried once.
func (c *hostClock) follow() (done bool, err error) {
	if c.host == nil {
		return false, nil
	}
	ahead, ok := c.host()
	if !ok {
		c.host = nil
		return false, nil
	}
	if ahead.Abs() < ptpNoise {
		return true, nil
	}
	return true, c.adjust(ahead)
}

func adjustClock(by time.Duration) error {
	t := unix.Timex{Modes: unix.ADJ_OFFSET_SINGLESHOT, Offset: by.Microseconds()}
	if by.Abs() > maxSlew {
		t = unix.Timex{Modes: unix.ADJ_SETOFFSET | unix.ADJ_NANO}
		t.Time.Sec = int64(by / time.Second)
		if t.Time.Usec = int64(by % time.Second); t.Time.Usec < 0 { // the kernel wants the nanoseconds positive
			t.Time.Sec--
			t.Time.Usec += int64(time.Second)
		}
	}
	if _, err := unix.Adjtimex(&t); err != nil {
		return fmt.Errorf("correct the clock by %v: %w", by, err)
	}
	return nil
}

// ptpName is that of KVM's own clock device, which shows the host's clock.
const ptpName = "KVM virtual PTP"

// readPTP compares the wall clock with KVM's clock device, at one instant.
func readPTP() (ahead time.Duration, ok bool) {
	files, _ := filepath.Glob("/sys/class/ptp/*/clock_name")
	for _, file := range files {
		if name, err := os.ReadFile(file); err != nil || strings.TrimSpace(string(name)) != ptpName {
			continue
		}
		f, err := os.Open("/dev/" + filepath.Base(filepath.Dir(file)))
		if err != nil {
			return 0, false
		}
		defer f.Close()
		// struct ptp_sys_offset_precise: device, realtime and raw clock, 16 bytes
		// each, and 16 spare bytes.
		var b [64]byte
		const ptpSysOffsetPrecise = 0xc0403d08
		if ioctlBytes(int(f.Fd()), ptpSysOffsetPrecise, b[:]) != nil {
			return 0, false
		}
		return ptpTime(b[0:16]).Sub(ptpTime(b[16:32])), true
	}
	return 0, false
}

// ptpTime reads a struct ptp_clock_time.
func ptpTime(b []byte) time.Time {
	return time.Unix(int64(binary.NativeEndian.Uint64(b)), int64(binary.NativeEndian.Uint32(b[8:])))
}
