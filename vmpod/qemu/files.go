package qemu

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
)

// A fdTable opens, as the driver's user, all that a launch needs and names it
// to QEMU by descriptor.
type fdTable struct {
	sockets map[string]string // name → path
	files   []*os.File        // descriptor 3 and on in QEMU
	sets    []string          // arguments
	err     error             // the first failure of file
	// nowhere is where taps are made that lead nowhere.
	nowhere *nowhere
}

// add returns the descriptor that f will be in QEMU. The table closes f.
func (t *fdTable) add(f *os.File) int {
	t.files = append(t.files, f)
	return 2 + len(t.files)
}

func (t *fdTable) close() {
	for _, f := range t.files {
		f.Close()
	}
}

func (t *fdTable) extra() []string { return t.sets }

// file is for what QEMU opens by plain open(2): through /proc it reopens a
// descriptor, which takes the right to read the file but not its directories.
// A file that QEMU's user may not read is handed over as a copy in memory.
func (t *fdTable) file(path string) string {
	f, err := os.Open(path)
	if err == nil {
		f, err = readableByAll(f)
	}
	if err != nil {
		t.err = errors.Join(t.err, err)
		return ""
	}
	return "/proc/self/fd/" + strconv.Itoa(t.add(f))
}

// opened is for a file that the driver has open already, and keeps.
func (t *fdTable) opened(f *os.File) string {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.err = errors.Join(t.err, os.NewSyscallError("fcntl", err))
		return ""
	}
	return "/proc/self/fd/" + strconv.Itoa(t.add(os.NewFile(uintptr(fd), f.Name())))
}

func readableByAll(f *os.File) (*os.File, error) {
	st, err := f.Stat()
	if err == nil && st.Mode().Perm()&0o004 != 0 {
		return f, nil
	}
	defer f.Close()
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate(filepath.Base(f.Name()), unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	m := os.NewFile(uintptr(fd), f.Name())
	_, err = m.ReadFrom(f)
	if err = errors.Join(err, m.Chmod(0o444)); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// disk puts a disk's image into an fdset, which QEMU opens as /dev/fdset/N.
func (t *fdTable) disk(d vmpod.Disk) (string, error) {
	return openImage(d, func(f *os.File) (string, error) {
		fd, set := t.add(f), len(t.sets)/2
		t.sets = append(t.sets, "-add-fd", fmt.Sprintf("fd=%d,set=%d,opaque=%s", fd, set, diskName(d.ID)))
		return fdsetPath(set), nil
	})
}

func fdsetPath(set int) string { return "/dev/fdset/" + strconv.Itoa(set) }

func (t *fdTable) listener(name string) (string, error) {
	f, err := listen(t.sockets[name])
	if err != nil {
		return "", err
	}
	return "fd=" + strconv.Itoa(t.add(f)), nil
}

func (t *fdTable) tap(n vmpod.NIC) (string, error) {
	var f *os.File
	var err error
	if n.Tap == "" {
		err = t.nowhere.do(func() (err error) {
			f, err = attachTap("")
			return err
		})
	} else {
		f, err = openTap(n.Tap)
	}
	if err != nil {
		return "", err
	}
	return "fd=" + strconv.Itoa(t.add(f)), nil
}

// listen returns a listening unix socket at path, replacing one that a dead
// process left.
func listen(path string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer l.Close()
	l.SetUnlinkOnClose(false) // QEMU listens on
	return l.File()
}

// openDisk opens what a disk's path names: a regular file or block device.
func openDisk(path string, readOnly bool) (*os.File, error) {
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	f, err := os.OpenFile(path, flags|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("disk image %s is not there: %w", path, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() && st.Mode()&(fs.ModeDevice|fs.ModeCharDevice) != fs.ModeDevice {
		err = fmt.Errorf("disk image %s is neither a file nor a block device: %w", path, errdefs.ErrInvalidArgument)
	}
	if err == nil {
		err = unix.SetNonblock(int(f.Fd()), false)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// fileDriver is QEMU's protocol driver for a path.
func fileDriver(path string) string {
	if st, err := os.Stat(path); err == nil && st.Mode()&fs.ModeDevice != 0 {
		return "host_device"
	}
	return "file"
}

// openImage opens a disk's image with all that it consists of. add hands one
// file to QEMU, owning it from then on, and returns the name under which QEMU
// opens it; openImage returns the name of the image.
func openImage(d vmpod.Disk, add func(*os.File) (string, error)) (string, error) {
	if d.Format == "vmdk" {
		return openVMDK(d, add)
	}
	f, err := openDisk(d.Path, d.ReadOnly)
	if err != nil {
		return "", err
	}
	return add(f)
}

// maxDescriptor bounds a VMDK descriptor file, in bytes; ours have a line of
// some 100 bytes for each image layer.
const maxDescriptor = 256 << 10

// openVMDK opens a VMDK descriptor and every extent it names. QEMU would open
// the extents by path, which it has no right to: so what it gets is a copy of
// the descriptor that calls the extents by their fdsets.
func openVMDK(d vmpod.Disk, add func(*os.File) (string, error)) (string, error) {
	f, err := openDisk(d.Path, true)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b := make([]byte, maxDescriptor+1)
	n, err := f.ReadAt(b, 0)
	if n > maxDescriptor || !strings.HasPrefix(string(b[:n]), "# Disk DescriptorFile") {
		return "", fmt.Errorf("disk image %s is not a VMDK descriptor (%d bytes, %v): %w", d.Path, n, err, errdefs.ErrInvalidArgument)
	}
	text, err := rewriteExtents(string(b[:n]), func(name string) (string, error) {
		if !filepath.IsAbs(name) {
			name = filepath.Join(filepath.Dir(d.Path), name)
		}
		x, err := openDisk(name, d.ReadOnly)
		if err != nil {
			return "", err
		}
		return add(x)
	})
	if err != nil {
		return "", fmt.Errorf("disk image %s: %w", d.Path, err)
	}
	fd, err := unix.MemfdCreate("vmdk-"+d.ID, unix.MFD_CLOEXEC)
	if err != nil {
		return "", os.NewSyscallError("memfd_create", err)
	}
	m := os.NewFile(uintptr(fd), "vmdk-"+d.ID)
	if _, err := m.WriteString(text); err != nil {
		m.Close()
		return "", err
	}
	if d.ReadOnly {
		// An fdset's member must have the access mode that QEMU asks for.
		ro, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", m.Fd()))
		m.Close()
		if err != nil {
			return "", err
		}
		m = ro
	}
	return add(m)
}

// rewriteExtents replaces the file names of a VMDK descriptor's extent lines,
// such as
//
//	RW 4096 FLAT "layer.img" 0
//
// by what rename says, and writes every extent as RW: QEMU skips the others,
// and a disk is read-only by its node, not by its extents.
func rewriteExtents(text string, rename func(string) (string, error)) (string, error) {
	lines := strings.Split(text, "\n")
	found := false
	for i, line := range lines {
		f := strings.Fields(line)
		if len(f) < 4 || (f[0] != "RW" && f[0] != "RDONLY") {
			continue
		}
		if _, err := strconv.ParseInt(f[1], 10, 64); err != nil {
			continue
		}
		head, rest, ok := strings.Cut(line, `"`)
		name, tail, ok2 := strings.Cut(rest, `"`)
		if f[2] != "FLAT" || !ok || !ok2 {
			return "", fmt.Errorf("extent %q: only FLAT extents are supported: %w", line, errdefs.ErrInvalidArgument)
		}
		renamed, err := rename(name)
		if err != nil {
			return "", err
		}
		lines[i] = "RW" + strings.TrimPrefix(strings.TrimPrefix(strings.TrimSpace(head), "RW"), "RDONLY") + ` "` + renamed + `"` + tail
		found = true
	}
	if !found {
		return "", fmt.Errorf("the VMDK descriptor names no extent: %w", errdefs.ErrInvalidArgument)
	}
	return strings.Join(lines, "\n"), nil
}

// openTap attaches to the tap called name in this process's network
// namespace. It never makes one.
func openTap(name string) (*os.File, error) {
	if _, err := net.InterfaceByName(name); err != nil {
		return nil, fmt.Errorf("tap %s is not there: %w", name, errdefs.ErrNotFound)
	}
	return attachTap(name)
}

// attachTap opens a tap; without a name, it is a new one, which goes with the
// last that has it open.
func attachTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun (load the tun module): %w", err)
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		// The header carries checksum and segmentation offloads.
		flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		ifr.SetUint16(flags)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
		if errors.Is(err, unix.EINVAL) { // made with several queues
			ifr.SetUint16(flags | unix.IFF_MULTI_QUEUE)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
		}
	}
	if err != nil {
		unix.Close(fd)
		if errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("tap %s is in use by another VM: %w", name, errdefs.ErrUnavailable)
		}
		return nil, fmt.Errorf("attach to tap %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), "tap:"+name), nil
}
