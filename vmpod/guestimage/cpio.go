package guestimage

import (
	"bytes"
	"fmt"
	"path"
	"sort"
	"strings"
)

// An entry is one file of the initramfs. Its path is absolute and clean.
type entry struct {
	path  string
	mode  uint32 // type and permission bits, as in st_mode
	major uint32 // of a device node
	minor uint32
	data  []byte
	from  string // where data came from, for the manifest; empty if made up
}

// Bits of st_mode that an initramfs needs.
const (
	modeDir     = 0o040000
	modeFile    = 0o100000
	modeSymlink = 0o120000
	modeChar    = 0o020000
)

// writeCPIO returns the entries as a newc archive, the only format that the
// kernel unpacks (Documentation/driver-api/early-userspace/buffer-format).
// Parents are added, entries sorted, owners and times zero: equal entries give
// equal bytes.
func writeCPIO(entries []entry) ([]byte, error) {
	byPath := map[string]entry{}
	for _, e := range entries {
		if !path.IsAbs(e.path) || path.Clean(e.path) != e.path || e.path == "/" {
			return nil, fmt.Errorf("initramfs: %q is not a clean absolute path", e.path)
		}
		if _, ok := byPath[e.path]; ok && e.mode&modeDir == 0 {
			return nil, fmt.Errorf("initramfs: %s is there twice", e.path)
		}
		byPath[e.path] = e
	}
	for _, e := range entries {
		for d := path.Dir(e.path); d != "/"; d = path.Dir(d) {
			if _, ok := byPath[d]; !ok {
				byPath[d] = entry{path: d, mode: modeDir | 0o755}
			}
		}
	}
	paths := make([]string, 0, len(byPath))
	for p := range byPath {
		paths = append(paths, p)
	}
	sort.Strings(paths) // a parent sorts before its children

	var b bytes.Buffer
	for i, p := range paths {
		e := byPath[p]
		links := 1
		if e.mode&modeDir != 0 && e.mode&modeFile == 0 {
			links = 2
		}
		writeRecord(&b, strings.TrimPrefix(p, "/"), uint32(i+1), e, links)
	}
	writeRecord(&b, "TRAILER!!!", 0, entry{}, 1)
	return b.Bytes(), nil
}

// writeRecord writes one header of 13 fields of 8 hex digits, the name and
// the data, each padded to 4 bytes.
func writeRecord(b *bytes.Buffer, name string, ino uint32, e entry, links int) {
	fmt.Fprintf(b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		ino, e.mode, 0, 0, links, 0, len(e.data), 0, 0, e.major, e.minor, len(name)+1, 0)
	b.WriteString(name)
	b.WriteByte(0)
	pad4(b)
	b.Write(e.data)
	pad4(b)
}

func pad4(b *bytes.Buffer) {
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
}
