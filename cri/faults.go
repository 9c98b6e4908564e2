package cri

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
)

// Faults has fn called for every fault of a pod's VM, and when it is over, in
// order, from one goroutine; also for those found since the server began. It
// is to be called once at most.
func (s *Server) Faults(fn func(vmpod.Fault)) {
	s.background.Go(func() { s.faults.follow(s.ctx, fn) })
}

// minFree is what must be free on a file system for it not to count as full,
// in bytes: a commit of the state file needs some ten pages.
const minFree = 1 << 20

// diskFault says whether the file system of the pods' disks, or that of the
// state, is full.
func (s *Server) diskFault() (reason, message string) {
	for _, of := range []struct{ what, dir string }{{"the pods' disks", s.containerFS()}, {"the runtime's state", s.config.StateDir}} {
		var st unix.Statfs_t
		if of.dir == "" || unix.Statfs(of.dir, &st) != nil || st.Bavail*uint64(st.Bsize) >= minFree {
			continue
		}
		return vmpod.ReasonHostDiskFull, fmt.Sprintf("the file system of %s (%s) is full: free space on it", of.what, of.dir)
	}
	if n := s.store.unrecorded(); n > 0 {
		return "StateNotRecorded", fmt.Sprintf("%d changes could not be written to %s yet; they are kept in memory", n, s.store.db.Path())
	}
	return "", ""
}

// notRecorded says what a state file that cannot be written means.
func (s *store) notRecorded(what, id string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%s %s: %w: free space on the file system of %s: %w", what, id, err, s.db.Path(), errdefs.ErrResourceExhausted)
	}
	return fmt.Errorf("%s %s: %w", what, id, err)
}
