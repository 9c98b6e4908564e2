//go:build unix

package client

import (
	"os"
	"syscall"
)

// keepOwner gives f the owner of the file that it takes the place of, where
// that is another one's.
func keepOwner(f *os.File, old os.FileInfo) error {
	sys, ok := old.Sys().(*syscall.Stat_t)
	if !ok || int(sys.Uid) == os.Geteuid() {
		return nil
	}
	return f.Chown(int(sys.Uid), int(sys.Gid))
}
