package vmpod

import (
	"path/filepath"
	"strings"
)

// A HostDirectory is a directory of the host that the operator lets pods use
// live, with all that lies below it.
type HostDirectory struct {
	// Path is absolute, clean and without symbolic links.
	Path string
	// ReadOnly keeps every pod from changing anything below Path.
	ReadOnly bool
}

// FindHostDirectory returns the innermost of dirs that path, absolute and
// clean, is or lies below. It compares names only: whether path has symbolic
// links is for the caller to know.
func FindHostDirectory(dirs []HostDirectory, path string) (HostDirectory, bool) {
	var found HostDirectory
	for _, d := range dirs {
		rel, err := filepath.Rel(d.Path, path)
		if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
			continue
		}
		if len(d.Path) > len(found.Path) {
			found = d
		}
	}
	return found, found.Path != ""
}

// A Share is a directory or a single file of the host that the guest sees as
// it is and, unless it is read-only, can change. The guest mounts it by its ID,
// as virtiofs; a single file is then alone in a directory, under its own name.
type Share struct {
	// ID is unique within the VM: 1 to 20 characters of [a-z0-9-].
	ID string `json:"id"`
	// Path is absolute on the host, without symbolic links, and must be or lie
	// below one of the directories that the driver was given.
	Path string `json:"path"`
	// ReadOnly is enforced on the host. What is mounted below Path stays as it
	// is unless RecursiveReadOnly is set too.
	ReadOnly          bool `json:"readOnly,omitempty"`
	RecursiveReadOnly bool `json:"recursiveReadOnly,omitempty"`
	// Follow lets the guest see what the host mounts and unmounts below Path
	// from now on; without it the guest keeps the mounts of this moment.
	Follow bool `json:"follow,omitempty"`
}
