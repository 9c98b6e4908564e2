// Package treesum describes file trees so that two of them can be compared
// entry by entry: what is in an image's layers, in a directory, on a mounted
// disk, or in front of a process in a container. It links little, since the
// treesum command runs inside containers.
package treesum

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// An Entry is one name of a tree. The zero value of a field that its type has
// no use for is left out of the written form.
type Entry struct {
	Path string `json:"path"` // "/" or "/etc/passwd"
	// Type is file, dir, symlink, char, block, fifo or socket.
	Type string `json:"type"`
	Mode string `json:"mode"` // the 12 permission bits, "4755"
	UID  uint32 `json:"uid"`
	GID  uint32 `json:"gid"`
	// Mtime in seconds since 1970, with nine decimals if they are not zero.
	Mtime  string `json:"mtime"`
	Size   int64  `json:"size,omitempty"`   // of a file
	SHA256 string `json:"sha256,omitempty"` // of a file's content
	Target string `json:"target,omitempty"` // of a symlink
	Device string `json:"device,omitempty"` // "1:3"
	// Same is the first path, in the order of the list, of those that are
	// hard links of one inode; left out where there is only one.
	Same string `json:"same,omitempty"`
	// Nlink is a file's link count.
	Nlink uint64 `json:"nlink,omitempty"`
	// Xattrs by full name.
	Xattrs map[string][]byte `json:"xattrs,omitempty"`
}

// FormatMtime is how Entry has times.
func FormatMtime(sec int64, nsec uint32) string {
	if nsec == 0 {
		return fmt.Sprint(sec)
	}
	return fmt.Sprintf("%d.%09d", sec, nsec)
}

// Text is how Entry has paths and targets: as they are, or quoted as in Go if
// they are not UTF-8, which JSON could not tell from each other.
func Text(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return strconv.Quote(s)
}

// Sort brings entries into their order, bytewise by path with "/" before every
// other character: a directory comes before all that is in it, and that before
// its next sibling.
func Sort(entries []Entry) {
	slices.SortFunc(entries, func(a, b Entry) int { return comparePaths(a.Path, b.Path) })
}

func comparePaths(a, b string) int {
	return strings.Compare(strings.ReplaceAll(a, "/", "\x00"), strings.ReplaceAll(b, "/", "\x00"))
}

// Write writes entries as one line of JSON each.
func Write(w io.Writer, entries []Entry) error {
	bw := bufio.NewWriter(w)
	enc := json.NewEncoder(bw)
	enc.SetEscapeHTML(false)
	for _, e := range entries {
		if err := enc.Encode(e); err != nil {
			return err
		}
	}
	return bw.Flush()
}

// Read reads what Write wrote.
func Read(r io.Reader) ([]Entry, error) {
	var entries []Entry
	dec := json.NewDecoder(r)
	for {
		var e Entry
		err := dec.Decode(&e)
		if err == io.EOF {
			return entries, nil
		}
		if err != nil {
			return nil, fmt.Errorf("tree sum, entry %d: %w", len(entries)+1, err)
		}
		entries = append(entries, e)
	}
}

// Diff says in what got differs from want, a line a difference, at most limit
// of them. Paths in skip, and what is below them, are left out on both sides;
// of their directories the mtime and link counts are not compared.
func Diff(want, got []Entry, limit int, skip ...string) []string {
	w, g := index(want, skip), index(got, skip)
	paths := map[string]bool{}
	for p := range w {
		paths[p] = true
	}
	for p := range g {
		paths[p] = true
	}
	var diffs []string
	for _, p := range slices.SortedFunc(maps.Keys(paths), comparePaths) {
		we, inWant := w[p]
		ge, inGot := g[p]
		switch {
		case !inGot:
			diffs = append(diffs, fmt.Sprintf("%s: missing, want %s", p, line(we)))
		case !inWant:
			diffs = append(diffs, fmt.Sprintf("%s: unexpected: %s", p, line(ge)))
		case line(we) != line(ge):
			diffs = append(diffs, fmt.Sprintf("%s:\n  want %s\n  got  %s", p, line(we), line(ge)))
		}
		if len(diffs) == limit {
			return append(diffs, "…")
		}
	}
	return diffs
}

func index(entries []Entry, skip []string) map[string]Entry {
	m := map[string]Entry{}
	for _, e := range entries {
		if below(e.Path, skip) {
			continue
		}
		for _, s := range skip {
			if parent := s[:max(strings.LastIndexByte(s, '/'), 1)]; e.Path == parent {
				e.Mtime, e.Nlink = "", 0
			}
		}
		m[e.Path] = e
	}
	return m
}

// below tells whether path is one of dirs or in one.
func below(path string, dirs []string) bool {
	for _, d := range dirs {
		if path == d || strings.HasPrefix(path, strings.TrimSuffix(d, "/")+"/") {
			return true
		}
	}
	return false
}

func line(e Entry) string {
	b, err := json.Marshal(e)
	if err != nil {
		return err.Error()
	}
	return string(b)
}
