package cluster

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func layout(t *testing.T) Layout {
	t.Helper()
	l, err := NewLayout(filepath.Join(t.TempDir(), "data"))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestLayout(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Mkdir(filepath.Join(dir, "real"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("real", link); err != nil {
		t.Fatal(err)
	}
	a, _ := NewLayout(filepath.Join(dir, "real"))
	b, _ := NewLayout(link + "/")
	if a != b || len(a.ID()) != 8 || a.NetnsName() != "atoll-"+a.ID() {
		t.Errorf("layouts %+v and %+v, id %q", a, b, a.ID())
	}
	before, _ := NewLayout(filepath.Join(link, "later"))
	if err := os.Mkdir(filepath.Join(dir, "real", "later"), 0o700); err != nil {
		t.Fatal(err)
	}
	if after, _ := NewLayout(filepath.Join(link, "later")); before != after {
		t.Errorf("layout before the directory is made %v, after %v", before, after)
	}
	if a.RunDir() == a.NodeRunDir("n") {
		t.Error("node and cluster share a run directory")
	}
	if _, err := NewLayout("/"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("NewLayout(/) = %v", err)
	}
}

func TestState(t *testing.T) {
	l := layout(t)
	if _, err := ReadState(l); !errdefs.IsNotFound(err) {
		t.Fatalf("empty: %v", err)
	}
	if err := WriteState(l, State{Isolated: true, Node: "n"}); err != nil {
		t.Fatal(err)
	}
	s, err := ReadState(l)
	if err != nil || !s.Isolated || s.Node != "n" || s.Created.IsZero() {
		t.Fatalf("read back %+v, %v", s, err)
	}
	for content, class := range map[string]func(error) bool{
		`{"kind":"AtollData","version":99}`: errdefs.IsFailedPrecondition,
		`{"kind":"Other","version":1}`:      errdefs.IsInvalidArgument,
		`garbage`:                           errdefs.IsInvalidArgument,
	} {
		if err := os.WriteFile(l.stateFile(), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadState(l); !class(err) {
			t.Errorf("%s: %v", content, err)
		}
	}
}

func TestLockExcludes(t *testing.T) {
	l := layout(t)
	unlock, err := Lock(l)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(l); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), l.DataDir()) {
		t.Errorf("second lock: %v", err)
	}
	unlock()
	unlock, err = Lock(l)
	if err != nil {
		t.Fatalf("after unlock: %v", err)
	}
	unlock()
	if _, err := os.Stat(l.lockFile()); err == nil {
		t.Error("lock file left behind")
	}
}
