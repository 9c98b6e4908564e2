package podinit

import (
	"context"
	"fmt"
	"io"
	"os"
	"unsafe"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
)

// Requests of the file systems' own ioctls: fs/ext4/ext4.h and
// fs/xfs/libxfs/xfs_fs.h.
const (
	ext4Resize   = 0x40086610 // EXT4_IOC_RESIZE_FS
	xfsGrow      = 0x4010586e // XFS_IOC_FSGROWFSDATA
	xfsGeometry1 = 0x80705864 // XFS_IOC_FSGEOMETRY_V1
)

// ExpandVolume grows a DISK's file system, mounted as it is, to its disk.
func (a *agent) ExpandVolume(ctx context.Context, r *agentapi.ExpandVolumeRequest) (*agentapi.ExpandVolumeResponse, error) {
	if err := a.requireSandbox(); err != nil {
		return nil, err
	}
	l := a.lockOf("v/" + r.Id)
	l.Lock()
	defer l.Unlock()
	v, ok := a.volume(r.Id)
	if !ok || v.disk == nil {
		return nil, fmt.Errorf("volume %q is no disk of this VM: %w", r.Id, errdefs.ErrNotFound)
	}
	var size int64
	err := waitDevice(ctx, fmt.Sprintf("disk %s with %d bytes", v.disk.request.Serial, r.Bytes), deviceTimeout, func() (_ bool, err error) {
		size, err = deviceBytes(v.disk.device)
		return size >= r.Bytes, err
	})
	if err == nil && !v.disk.request.Block && !v.disk.request.ReadOnly && !readOnlyMount(v.mountPoint()) {
		err = growFileSystem(v.mountPoint(), v.disk.request.FsType, size)
	}
	if err != nil {
		return nil, fmt.Errorf("expand volume %s: %w", r.Id, err)
	}
	return &agentapi.ExpandVolumeResponse{Bytes: size}, nil
}

func deviceBytes(device string) (int64, error) {
	f, err := os.Open(device)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, io.SeekEnd)
}

// growFileSystem makes a mounted file system as large as its device, which has
// size bytes. One that is as large already stays as it is.
func growFileSystem(dir, fsType string, size int64) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if fsType == "xfs" {
		return growXFS(int(f.Fd()), size)
	}
	var s unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &s); err != nil {
		return err
	}
	blocks := uint64(size) / uint64(s.Bsize)
	return ioctl(f.Fd(), ext4Resize, unsafe.Pointer(&blocks))
}

// xfsGeometry is struct xfs_fsop_geom_v1.
type xfsGeometry struct {
	blocksize, rtextsize, agblocks, agcount, logblocks, sectsize, inodesize, imaxpct uint32
	datablocks, rtblocks, rtextents, logstart                                        uint64
	uuid                                                                             [16]byte
	sunit, swidth                                                                    uint32
	version                                                                          int32
	flags, logsectsize, rtsectsize, dirblocksize                                     uint32
}

// xfsGrowth is struct xfs_growfs_data.
type xfsGrowth struct {
	newblocks uint64
	imaxpct   uint32
	_         uint32
}

func growXFS(fd int, size int64) error {
	var g xfsGeometry
	if err := ioctl(uintptr(fd), xfsGeometry1, unsafe.Pointer(&g)); err != nil {
		return fmt.Errorf("ask for its geometry: %w", err)
	}
	want := xfsGrowth{newblocks: uint64(size) / uint64(g.blocksize), imaxpct: g.imaxpct}
	if want.newblocks <= g.datablocks {
		return nil
	}
	return ioctl(uintptr(fd), xfsGrow, unsafe.Pointer(&want))
}

func ioctl(fd uintptr, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}
