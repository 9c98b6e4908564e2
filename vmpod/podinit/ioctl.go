package podinit

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctlBytes is an ioctl whose argument is a struct of variable length, for
// which x/sys/unix has no helper.
func ioctlBytes(fd int, request uint, b []byte) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(&b[0]))); errno != 0 {
		return errno
	}
	return nil
}
