package podinit

import (
	"errors"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Modes that a group's files and directories have at least, as upstream's
// pkg/volume/volume_linux.go has them.
const (
	groupFile = 0o660
	groupDir  = 0o2770
)

// giveToGroup makes a group the owner of all that is in a volume. The root comes
// last: if it is cut off, onMismatch does not take it for done. It runs before
// any container has the volume.
func giveToGroup(root string, gid int, onMismatch bool) error {
	if onMismatch {
		var st unix.Stat_t
		if err := unix.Lstat(root, &st); err != nil {
			return err
		}
		if int(st.Gid) == gid && st.Mode&groupDir == groupDir {
			return nil
		}
	}
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		return giveOne(path, gid)
	})
	if err != nil {
		return err
	}
	return giveOne(root, gid)
}

func giveOne(path string, gid int) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return err
	}
	want := st.Mode&0o7777 | groupFile
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		want |= groupDir
	case unix.S_IFLNK:
		want = st.Mode & 0o7777 // links have no mode of their own
	}
	if int(st.Gid) != gid {
		if err := unix.Lchown(path, -1, gid); err != nil && !errors.Is(err, unix.EPERM) { // immutable files stay
			return err
		}
		want |= 0o10000 // a change of owner drops set-id bits: set the mode again
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK || want == st.Mode&0o7777 {
		return nil
	}
	if err := unix.Chmod(path, want&0o7777); err != nil && !errors.Is(err, unix.EPERM) {
		return err
	}
	return nil
}
