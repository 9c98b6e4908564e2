package cri

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

func rec(offset uint64, line string) *agentapi.LogRecord {
	return &agentapi.LogRecord{Offset: offset, TimeNs: time.Unix(1, 5).UnixNano(), Line: []byte(line)}
}

func TestLogFormat(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sub/0.log")
	l, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	l.add(rec(1, "plain"))
	p := rec(2, "part")
	p.Partial, p.Stream = true, agentapi.LogRecord_STDERR
	l.add(p)
	l.add(rec(3, "sneaky\n1970 stdout F forged"))
	if err := l.flush(); err != nil {
		t.Fatal(err)
	}
	b, _ := os.ReadFile(path)
	want := "1970-01-01T00:00:01.000000005Z stdout F plain\n1970-01-01T00:00:01.000000005Z stderr P part\n1970-01-01T00:00:01.000000005Z stdout F sneaky 1970 stdout F forged\n"
	if string(b) != want {
		t.Fatalf("got %q", b)
	}
	if fi, _ := os.Stat(path); fi.Mode().Perm() != 0o640 {
		t.Fatalf("mode %v", fi.Mode())
	}
}

func TestLogFollowsNoLinks(t *testing.T) {
	dir := t.TempDir()
	victim := filepath.Join(dir, "victim")
	os.WriteFile(victim, []byte("x"), 0o600)
	os.Symlink(victim, filepath.Join(dir, "0.log"))
	if _, err := openLog(filepath.Join(dir, "0.log")); err == nil {
		t.Error("followed a link at the end")
	}
	os.Mkdir(filepath.Join(dir, "real"), 0o755)
	os.Symlink("real", filepath.Join(dir, "linked"))
	if _, err := openLog(filepath.Join(dir, "linked/0.log")); err == nil {
		t.Error("followed a link to the directory")
	}
	if err := writeTermination(filepath.Join(dir, "0.log"), []byte("y")); err == nil {
		t.Error("wrote a termination message through a link")
	}
	if b, _ := os.ReadFile(victim); string(b) != "x" {
		t.Errorf("victim has %q", b)
	}
}

// A crash may come at any moment: what was written counts, and nothing else.
func TestWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "0.log")
	l, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	l.add(rec(1, "one"))
	l.flush()
	c := l.cursor(1)
	l.add(rec(2, "two"))
	l.add(rec(3, strings.Repeat("long", 100_000)))
	l.flush()
	size := l.size
	l.f.WriteString("1970 stdout F torn")
	l.close()
	if n, err := written(path, c); err != nil || n != 3 {
		t.Fatalf("got %d, %v; want 3", n, err)
	}
	if fi, _ := os.Stat(path); fi.Size() != size {
		t.Fatalf("the torn line is still there")
	}
	// A rotation that the crash cut short.
	os.Rename(path, path+".20260101-000000")
	if n, err := written(path, c); err != nil || n != 3 {
		t.Fatalf("renamed: got %d, %v; want 3", n, err)
	}
	os.Remove(path + ".20260101-000000")
	if n, err := written(path, c); err != nil || n != 1 {
		t.Fatalf("removed: got %d, %v; want the cursor's", n, err)
	}
}

func TestRotation(t *testing.T) {
	h := newFakeHost()
	s := serve(t, h, t.TempDir())
	ctr := s.create(t, s.run(t), ctrConfig("main"))
	s.start(t, ctr)
	g := h.guest(podUID)
	log := filepath.Join(podConfig(s.dir).LogDirectory, "main/0.log")
	g.log(ctr, "before")
	eventually(t, "written", func() bool { b, _ := os.ReadFile(log); return len(b) > 0 })
	os.Rename(log, log+".1")
	if _, err := s.rt.ReopenContainerLog(t.Context(), &runtimeapi.ReopenContainerLogRequest{ContainerId: ctr}); err != nil {
		t.Fatal(err)
	}
	g.log(ctr, "after")
	eventually(t, "written", func() bool { b, _ := os.ReadFile(log); return len(b) > 0 })
	if a, b := logText(t, log+".1"), logText(t, log); len(a) != 1 || len(b) != 1 || b[0] != "stdout F after" {
		t.Fatalf("%q, %q", a, b)
	}
	g.exit(ctr, 0, "")
	eventually(t, "exit seen", func() bool { return s.status(t, ctr).State == runtimeapi.ContainerState_CONTAINER_EXITED })
	if _, err := s.rt.ReopenContainerLog(t.Context(), &runtimeapi.ReopenContainerLogRequest{ContainerId: ctr}); err == nil {
		t.Fatal("reopened the log of an ended container")
	}
}

func TestStoreRefusesOtherVersions(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cri.db")
	st, fresh, err := openStore(path, secretStore{})
	if err != nil || !fresh {
		t.Fatal(fresh, err)
	}
	if _, _, err := openStore(path, secretStore{}); err == nil {
		t.Fatal("opened twice")
	}
	st.close()
	if st, fresh, err = openStore(path, secretStore{}); err != nil || fresh {
		t.Fatal(fresh, err)
	}
	st.close()
}

func TestAcksHaveNoGaps(t *testing.T) {
	a := &ackTracker{}
	a.reset()
	for o := uint64(1); o <= 4; o++ {
		a.begin(o)
	}
	if _, ok := a.end(2); ok {
		t.Fatal("2 before 1")
	}
	if n, ok := a.end(1); !ok || n != 2 {
		t.Fatal(n, ok)
	}
	if _, ok := a.end(4); ok {
		t.Fatal("4 before 3")
	}
	if n, ok := a.end(3); !ok || n != 4 {
		t.Fatal(n, ok)
	}
	if _, ok := a.end(9); ok {
		t.Fatal("unknown")
	}
}

func TestErrorsHaveClasses(t *testing.T) {
	if toGRPC(nil) != nil {
		t.Fatal("nil")
	}
	if err := toGRPC(refuse("f", "why")); !strings.Contains(err.Error(), "InvalidArgument") || !strings.Contains(err.Error(), "why") {
		t.Fatal(err)
	}
	if err := toGRPC(errors.New("odd")); !strings.Contains(err.Error(), "odd") {
		t.Fatal(err)
	}
}
