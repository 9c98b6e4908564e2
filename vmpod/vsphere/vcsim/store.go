package vcsim

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// The inventory's file is a journal: one line of JSON for each object that
// changed, its last line counts. A line is written before the caller hears that
// the change was made, so that a killed process loses nothing; the disk is told
// to keep it soon after, so that a power cut loses the last moments at most. A
// line that was cut short by either is at the end and is dropped. When most
// lines are old, a new file with the current ones takes its place.

const (
	journalFile = "inventory.journal"
	lockFile    = "lock"
	// compactAfter lines beyond twice those that count, the journal is renewed.
	compactAfter = 4096
)

// KeptFiles are the names of the files in Config.Dir that a backup needs. Each
// may be copied at any time: the server replaces them whole or appends to them,
// and does without a last line that was cut short.
func KeptFiles() []string { return []string{journalFile, PasswordFile, usersFile} }

// A line of the journal. A nil value says that the key is gone.
type line struct {
	Key   string          `json:"k"`
	Value json.RawMessage `json:"v,omitempty"`
}

// A store keeps values by key. One without a directory keeps them in memory
// alone. The caller serialises calls but for close.
type store struct {
	dir   string
	lock  *os.File
	mu    sync.Mutex // of file, which the syncer uses too
	file  *os.File
	live  map[string]json.RawMessage
	lines int

	dirty  chan struct{} // holds one when something is to be synced
	done   chan struct{}
	closed sync.Once
}

func openStore(dir string) (*store, error) {
	s := &store{dir: dir, live: map[string]json.RawMessage{}, dirty: make(chan struct{}, 1), done: make(chan struct{})}
	if dir == "" {
		close(s.done)
		return s, nil
	}
	var err error
	if s.lock, err = os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, fmt.Errorf("vcsim: %w", err)
	}
	if err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		s.lock.Close()
		return nil, fmt.Errorf("vcsim: another process uses %s: %w", dir, errdefs.ErrFailedPrecondition)
	}
	if err := s.load(); err != nil {
		s.lock.Close()
		return nil, err
	}
	go s.syncer()
	return s, nil
}

func (s *store) load() error {
	path := filepath.Join(s.dir, journalFile)
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("vcsim: inventory: %w", err)
	}
	r := bufio.NewReader(bytes.NewReader(b))
	for n := 1; ; n++ {
		text, err := r.ReadBytes('\n')
		if err == io.EOF { // the rest was cut short, or is empty
			break
		}
		var l line
		if json.Unmarshal(text, &l) != nil || l.Key == "" {
			if r.Buffered() == 0 {
				break // as above, cut by a power failure in the middle of a block
			}
			return fmt.Errorf("vcsim: %s: line %d cannot be read; restore the file from a backup, or remove it to start with an empty inventory: %w", path, n, errdefs.ErrDataLoss)
		}
		if l.Value == nil {
			delete(s.live, l.Key)
		} else {
			s.live[l.Key] = l.Value
		}
	}
	return s.compact()
}

// compact renews the file with what counts, and leaves it open.
func (s *store) compact() error {
	var b bytes.Buffer
	for _, key := range slices.Sorted(maps.Keys(s.live)) {
		if err := encode(&b, line{key, s.live[key]}); err != nil {
			return err
		}
	}
	path := filepath.Join(s.dir, journalFile)
	if err := writeFile(path, b.Bytes()); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("vcsim: inventory: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file != nil { // what nobody has synced of it is in the new one
		_ = s.file.Close()
	}
	s.file, s.lines = f, len(s.live)
	return nil
}

func encode(w io.Writer, l line) error {
	b, err := json.Marshal(l)
	if err == nil {
		_, err = w.Write(append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("vcsim: inventory: %w", err)
	}
	return nil
}

// put keeps values; nil ones are deleted.
func (s *store) put(values map[string]any) error {
	var b bytes.Buffer
	for _, key := range slices.Sorted(maps.Keys(values)) {
		var raw json.RawMessage
		if v := values[key]; v != nil {
			var err error
			if raw, err = json.Marshal(v); err != nil {
				return fmt.Errorf("vcsim: inventory: %s: %w", key, err)
			}
		}
		if raw == nil {
			if _, there := s.live[key]; !there {
				continue
			}
			delete(s.live, key)
		} else {
			if bytes.Equal(s.live[key], raw) {
				continue
			}
			s.live[key] = raw
		}
		if err := encode(&b, line{key, raw}); err != nil {
			return err
		}
		s.lines++
	}
	if s.dir == "" || b.Len() == 0 {
		return nil
	}
	if s.file == nil {
		return fmt.Errorf("vcsim: the server is closed: %w", errdefs.ErrFailedPrecondition)
	}
	if _, err := s.file.Write(b.Bytes()); err != nil {
		return fmt.Errorf("vcsim: inventory: %w", err)
	}
	if s.lines > 2*len(s.live)+compactAfter {
		return s.compact()
	}
	select {
	case s.dirty <- struct{}{}:
	default:
	}
	return nil
}

// syncer has the disk keep what was written, as often as the disk can.
func (s *store) syncer() {
	defer close(s.done)
	for range s.dirty {
		s.mu.Lock()
		_ = s.file.Sync() // close reports it
		s.mu.Unlock()
	}
}

// close writes everything to the disk. It is idempotent.
func (s *store) close() (err error) {
	s.closed.Do(func() {
		close(s.dirty)
		<-s.done
		if s.dir == "" {
			return
		}
		if err = errors.Join(s.file.Sync(), s.file.Close(), s.lock.Close()); err != nil {
			err = fmt.Errorf("vcsim: inventory: %w", err)
		}
		s.file = nil
	})
	return err
}
