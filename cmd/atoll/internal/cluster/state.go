package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// stateKind is in every state file; `down --purge` erases no directory that
// has none.
const stateKind = "AtollData"

// stateVersion is the format of the state file that this build writes.
const stateVersion = 1

// State is what of an `up` cannot be derived: the choices that were made the
// first time and hold as long as the data does.
type State struct {
	Kind     string    `json:"kind"`
	Version  int       `json:"version"`
	Created  time.Time `json:"created"`
	Isolated bool      `json:"isolated"`
	Node     string    `json:"node"`
	// NamespacesApart leaves the controllers of namespaces to atoll-namespaces.
	NamespacesApart bool `json:"namespacesApart,omitempty"`
	// TokenLifetime is how long logins are good; 0: the default.
	TokenLifetime time.Duration `json:"tokenLifetime,omitempty"`
}

// Netns is the path of the cluster's network namespace, empty for the host's.
func (s State) Netns(l Layout) string {
	if s.Isolated {
		return l.NetnsPath()
	}
	return ""
}

// ReadState returns the cluster's state; ErrNotFound if the directory is
// missing, empty or no data directory of Atoll.
func ReadState(l Layout) (State, error) {
	var s State
	b, err := os.ReadFile(l.stateFile())
	if errors.Is(err, fs.ErrNotExist) {
		return s, fmt.Errorf("there is no cluster in %s; `atoll up --data-dir %s` makes one: %w", l.DataDir(), l.DataDir(), errdefs.ErrNotFound)
	}
	if errors.Is(err, unix.ENOTDIR) {
		return s, fmt.Errorf("data directory %s is no directory; choose another with --data-dir: %w", l.DataDir(), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return s, fmt.Errorf("cluster's state: %w", err)
	}
	if err := json.Unmarshal(b, &s); err != nil || s.Kind != stateKind {
		return s, fmt.Errorf("%s is not a state file of Atoll; remove it if %s is Atoll's, or choose another directory: %w", l.stateFile(), l.DataDir(), errdefs.ErrInvalidArgument)
	}
	if s.Version > stateVersion {
		return s, fmt.Errorf("data directory %s was written by a newer Atoll (state version %d, this build knows %d); use that Atoll, or another directory: %w", l.DataDir(), s.Version, stateVersion, errdefs.ErrFailedPrecondition)
	}
	return s, nil
}

// WriteState makes the data directory, if need be, and writes its state.
func WriteState(l Layout, s State) error {
	s.Kind, s.Version = stateKind, stateVersion
	if s.Created.IsZero() {
		s.Created = time.Now().UTC().Truncate(time.Second)
	}
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(l.DataDir(), 0o700); err != nil {
		return fmt.Errorf("data directory: %w", err)
	}
	return replace(l.stateFile(), append(b, '\n'), 0o600)
}

// replace writes a file so that a crash leaves the old or the new one.
func replace(name string, content []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails once renamed
	_, err = f.Write(content)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return os.Rename(f.Name(), name)
}

// Lock keeps two commands from changing the same cluster at once. It does
// not wait: ErrUnavailable names the process that has it.
func Lock(l Layout) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(l.lockFile()), 0o755); err != nil {
		return nil, fmt.Errorf("cluster's lock: %w", err)
	}
	for {
		f, err := os.OpenFile(l.lockFile(), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, fmt.Errorf("cluster's lock: %w", err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			who := make([]byte, 32)
			n, _ := f.ReadAt(who, 0)
			f.Close()
			return nil, fmt.Errorf("another command (process %s) is changing the cluster in %s; wait until it ends: %w", who[:n], l.DataDir(), errdefs.ErrUnavailable)
		}
		// The last holder removes the file, perhaps between our open and our
		// lock: a lock on a file without a name keeps nobody out.
		if !sameFile(f, l.lockFile()) {
			f.Close()
			continue
		}
		if _, err := fmt.Fprint(f, os.Getpid()); err != nil {
			f.Close()
			return nil, fmt.Errorf("cluster's lock: %w", err)
		}
		return func() {
			_ = os.Remove(l.lockFile())
			f.Close()
		}, nil
	}
}

func sameFile(f *os.File, name string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Lstat(name)
	return err == nil && os.SameFile(a, b)
}
