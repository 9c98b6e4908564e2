package vmpod

import (
	"context"
	"os"
)

// A DiskCopier is a Machine that can copy a volume while its guest writes to it.
type DiskCopier interface {
	// CopyDisk has to become what the plugged volume with that disk ID has in
	// its own file, without those below it, at one instant after the call. Every
	// write that was acknowledged before the call is in it, and none that the
	// guest began after progress was called first: it is what a power cut at that
	// instant would have left. What the guest writes meanwhile waits for the copy
	// of what it overwrites, and does not fail because of it while the host has
	// room.
	//
	// Of a raw or luks volume to is an empty file, which gets its bytes (of luks
	// those that are on the host's disk: no key is needed, nothing is in the
	// clear) and its holes. Of a qcow2 volume it is a qcow2 file of equal size
	// without content. To is open for reading and writing, and stays the
	// caller's, who syncs it; after an error nothing of it counts.
	//
	// Progress, which may be nil, is called when the copy has begun and about
	// each second, with the bytes that are copied and those that are to be. One
	// disk is copied once at a time: ErrUnavailable. ErrNotFound without such a
	// disk, ErrInvalidArgument for one that is no volume, ErrFailedPrecondition
	// for a read-only one (nobody writes to it), ErrResourceExhausted without
	// room on the host, ErrUnavailable when the machine or the hypervisor's
	// answer is lost. It returns when nothing is written to to any more, unless
	// the hypervisor does not answer; what a killed process left of a copy is
	// ended when the machine is next opened, copied, resized or unplugged.
	// ctx ends it. ResizeDisk is ErrUnavailable meanwhile, and Unplug ends it.
	CopyDisk(ctx context.Context, diskID string, to *os.File, progress func(done, total int64)) error
}
