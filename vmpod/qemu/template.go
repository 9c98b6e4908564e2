package qemu

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A template is a guest that has booted until its agent answered, and was
// saved. It is not changed any more: its RAM is a sealed memfd.
type template struct {
	shape shape
	// name is its key, by which machines say what they are clones of.
	name string
	ram  *os.File
	// digest is the RAM's, state the file of its devices' state.
	digest string
	state  string
	made   time.Time
	bytes  int64 // of the RAM that the boot had used

	// Guarded by the store: launches that use it now, and whether it goes
	// with the last of them.
	users   int
	dropped bool
}

// templateSeals keep everybody, the driver too, from changing a template's RAM.
const templateSeals = unix.F_SEAL_WRITE | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

// newRAM makes the memory of a template's guest. QEMU opens it anew through
// /proc, as a user that may do so by the mode that memfds have; nobody else
// can name it.
func newRAM(size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate("atoll-template", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "memfd:atoll-template")
	if err := f.Truncate(size); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// seal makes RAM immutable. It fails while a QEMU has it mapped to write to.
func seal(ram *os.File) error {
	var err error
	for range 100 {
		if _, err = unix.FcntlInt(ram.Fd(), unix.F_ADD_SEALS, templateSeals); !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return os.NewSyscallError("fcntl", err)
}

// sealed says whether a file is RAM of a template of that size.
func sealed(ram *os.File, size int64) bool {
	var st unix.Stat_t
	seals, err := unix.FcntlInt(ram.Fd(), unix.F_GET_SEALS, 0)
	return err == nil && seals&templateSeals == templateSeals &&
		unix.Fstat(int(ram.Fd()), &st) == nil && st.Size == size
}

// used is the memory that a file in memory takes, in bytes.
func used(f *os.File) int64 {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return 0
	}
	return st.Blocks * 512
}

// openState opens the devices' state for one reader.
func (t *template) openState() (*os.File, error) {
	f, err := os.Open(t.state)
	if err != nil {
		return nil, fmt.Errorf("template %s: %w", t.name, err)
	}
	return f, nil
}

// The words for why a VM was booted and not cloned.
const (
	coldDisabled = "Disabled"     // templates are switched off
	coldShares   = "SharedMemory" // the node has host directories for pods
	coldDevices  = "Devices"      // more than can be plugged
	coldSize     = "Size"         // no template can be grown to it
	coldMissing  = "NoTemplate"   // none that fits has been made yet
	coldChanged  = "GuestChanged" // the guest or QEMU is not what templates are of
	coldFailed   = "CloneFailed"  // one was tried
)
