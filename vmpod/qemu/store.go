package qemu

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/vmpod"
)

// Names in a VM's directory; doc.go says what each holds.
const (
	specFile    = "spec.json"
	processFile = "process.json"
	devicesFile = "devices.json"
	stopFile    = "stop.json"
	exitFile    = "exit.json"
	consoleFile = "console.log"
	stderrFile  = "stderr.log"
)

// Directories whose name begins with one of these are not VMs: the first are
// being made, the others erased. ID's pattern lets no VM be called so.
const (
	newPrefix  = ".new-"
	gonePrefix = ".gone-"
)

// A vmDir is the directory of one VM.
type vmDir string

func (d vmDir) file(name string) string { return filepath.Join(string(d), name) }

// createVMDir makes the directory with its spec, at once and for good: after
// a crash either both are there or neither.
func createVMDir(state string, spec vmpod.Spec) (vmDir, error) {
	name := spec.ID.String()
	tmp := vmDir(filepath.Join(state, newPrefix+name))
	if err := os.RemoveAll(string(tmp)); err != nil {
		return "", err
	}
	if err := os.Mkdir(string(tmp), 0o700); err != nil {
		return "", err
	}
	if err := tmp.write(specFile, spec); err != nil {
		os.RemoveAll(string(tmp))
		return "", err
	}
	failpoint.Hit(failpoint.LaunchDirHalf)
	d := vmDir(filepath.Join(state, name))
	if err := os.Rename(string(tmp), string(d)); err != nil {
		os.RemoveAll(string(tmp))
		return "", err
	}
	return d, syncDir(state)
}

// erase removes the directory; the rename first, so that a crash leaves no
// half VM.
func (d vmDir) erase() error {
	gone := filepath.Join(filepath.Dir(string(d)), gonePrefix+filepath.Base(string(d)))
	err := os.Rename(string(d), gone)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	failpoint.Hit(failpoint.EraseDirHalf)
	err = os.RemoveAll(gone)
	failpoint.Hit(failpoint.EraseDirComplete)
	return err
}

// sweep erases what a crash left half made or half erased.
func sweep(state string) error {
	entries, err := os.ReadDir(state)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), newPrefix) || strings.HasPrefix(e.Name(), gonePrefix) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(state, e.Name())))
		}
	}
	return err
}

// write replaces a file by v as JSON, durably.
func (d vmDir) write(name string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(string(d), "."+name+"-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // of no effect after the rename
	_, err = f.Write(append(b, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), d.file(name)); err != nil {
		return err
	}
	return syncDir(string(d))
}

// read fills v from a file; ok is false when there is none.
func (d vmDir) read(name string, v any) (ok bool, err error) {
	b, err := os.ReadFile(d.file(name))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return false, fmt.Errorf("%s: %w", d.file(name), err)
	}
	return true, nil
}

func syncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// lastLine returns the last non-empty line of a file, at most 512 bytes of
// it, without control characters; "" if there is none.
func lastLine(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return ""
	}
	const tail = 4096
	b := make([]byte, min(st.Size(), tail))
	n, _ := f.ReadAt(b, st.Size()-int64(len(b)))
	lines := strings.Split(strings.TrimSpace(string(b[:n])), "\n")
	line := strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1
		}
		return r
	}, lines[len(lines)-1])
	return line[:min(len(line), 512)]
}

// stopIntent is stop.json.
type stopIntent struct {
	At time.Time `json:"at"`
}
