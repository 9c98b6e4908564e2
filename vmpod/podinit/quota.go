package podinit

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// projects count what directories of the pod's disk hold, and limit it, by the
// file system's project quotas: what is made below a directory belongs to its
// project, and the kernel keeps the sum. A process with CAP_SYS_RESOURCE is not
// limited, only counted.
//
// Where kernel or file system have no quotas, directories have no project, and
// what they hold is walked for.
type projects struct {
	mu   sync.Mutex
	last uint32
	of   map[string]project // by directory
}

type project struct {
	id uint32
	// top are the directories that it was given, which count for nothing.
	top uint64
}

// limitRoom (bytes) lets a volume become larger than its limit by so much that
// the kubelet, which evicts pods whose volume is, can see it.
const limitRoom = 1 << 20

// assign puts new, empty directories into one project, which is called by the
// first. No limit (bytes) is 0. A file system without quotas is no error.
func (p *projects) assign(limit int64, dirs ...string) error {
	root, err := os.Open(dirs[0])
	if err != nil {
		return err
	}
	defer root.Close()
	if _, err := getQuota(root, 0); err != nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last++
	id := p.last
	if limit > 0 {
		if err := setQuota(root, id, limit+limitRoom); err != nil {
			return fmt.Errorf("limit to %d bytes: %w", limit, err)
		}
	}
	for _, d := range dirs {
		if err := setProject(d, id); err != nil {
			return fmt.Errorf("quota project of %s: %w", d, err)
		}
	}
	q, err := getQuota(root, id)
	if err != nil {
		return fmt.Errorf("quota of %s: %w", dirs[0], err)
	}
	p.of[dirs[0]] = project{id: id, top: q.inodes}
	return nil
}

// usage returns what is below the directory, and whether that is known.
func (p *projects) usage(dir string) (bytes, inodes uint64, ok bool) {
	p.mu.Lock()
	pr, ok := p.of[dir]
	p.mu.Unlock()
	if !ok {
		return 0, 0, false
	}
	f, err := os.Open(dir)
	if err != nil {
		p.forget(dir)
		return 0, 0, false
	}
	defer f.Close()
	q, err := getQuota(f, pr.id)
	if err != nil {
		return 0, 0, false
	}
	return q.space, q.inodes - min(q.inodes, pr.top-1), true
}

// forget is for directories that are gone.
func (p *projects) forget(dir string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.of, dir)
}

// setProject is chattr -p ID +P.
func setProject(dir string, id uint32) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	// struct fsxattr of linux/fs.h: flags, extsize, nextents, projid, …
	attr := make([]byte, 28)
	if err := ioctlBytes(int(f.Fd()), fsGetXattr, attr); err != nil {
		return err
	}
	binary.NativeEndian.PutUint32(attr, binary.NativeEndian.Uint32(attr)|xflagProjectInherit)
	binary.NativeEndian.PutUint32(attr[12:], id)
	return ioctlBytes(int(f.Fd()), fsSetXattr, attr)
}

// From linux/fs.h and linux/quota.h.
const (
	fsGetXattr          = 0x801c581f
	fsSetXattr          = 0x401c5820
	xflagProjectInherit = 0x200

	projectQuota    = 2
	quotaGet        = 0x800007
	quotaSet        = 0x800008
	quotaSetsBlocks = 1
	quotaUnit       = 1024 // bytes, of limits
)

// dqblk is struct if_dqblk.
type dqblk struct {
	hardLimit, softLimit             uint64 // quotaUnit
	space                            uint64 // bytes
	hardInodes, softInodes, inodes   uint64
	graceEndsBlocks, graceEndsInodes uint64
	valid                            uint32
	_                                uint32
}

// quotactl asks the file system that f is on.
func quotactl(f *os.File, command, id uint32, q *dqblk) error {
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, f.Fd(), uintptr(command<<8|projectQuota), uintptr(id), uintptr(unsafe.Pointer(q)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func getQuota(f *os.File, id uint32) (q dqblk, err error) {
	err = quotactl(f, quotaGet, id, &q)
	return q, err
}

func setQuota(f *os.File, id uint32, limit int64) error {
	return quotactl(f, quotaSet, id, &dqblk{hardLimit: uint64(limit+quotaUnit-1) / quotaUnit, valid: quotaSetsBlocks})
}
