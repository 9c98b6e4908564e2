package podinit

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
)

func testJournal(t *testing.T) *logJournal {
	t.Helper()
	j, err := newLogJournal(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(j.close)
	return j
}

func noIdle() error { return nil }

func line(s string) *agentapi.LogRecord { return &agentapi.LogRecord{Line: []byte(s)} }

func TestLogJournal(t *testing.T) {
	j := testJournal(t)
	j.segsz = 200
	const n = 100
	go func() {
		for i := 1; i <= n; i++ {
			if err := j.append(line(fmt.Sprintf("line %03d", i))); err != nil {
				t.Error(err)
			}
		}
		j.append(&agentapi.LogRecord{Eof: true})
	}()
	var got []uint64
	err := j.follow(0, nil, records(func(r *agentapi.LogRecord) error {
		if !r.Eof && string(r.Line) != fmt.Sprintf("line %03d", r.Offset) {
			t.Errorf("record %d is %q", r.Offset, r.Line)
		}
		got = append(got, r.Offset)
		return nil
	}), noIdle)
	if err != nil || len(got) != n+1 || !slices.IsSorted(got) {
		t.Fatalf("%d records, %v", len(got), err)
	}
	for _, from := range []uint64{1, 17, n, n + 1} {
		first := uint64(0)
		err := j.follow(from, nil, records(func(r *agentapi.LogRecord) error {
			if first == 0 {
				first = r.Offset
			}
			return nil
		}), noIdle)
		if err != nil || first != from {
			t.Errorf("from %d: began at %d, %v", from, first, err)
		}
	}
	before := len(j.segments)
	j.ack(50)
	if len(j.segments) >= before {
		t.Error("acknowledging dropped nothing")
	}
	if err := j.follow(1, nil, records(func(*agentapi.LogRecord) error { return nil }), noIdle); !errdefs.IsOutOfRange(err) {
		t.Errorf("a dropped record: %v", err)
	}
	stopped := make(chan struct{})
	close(stopped)
	if err := j.follow(n+2, stopped, records(func(*agentapi.LogRecord) error { return errors.New("a record from nowhere") }), noIdle); err != nil {
		t.Error(err)
	}
}

// TestLogJournalBackPressure: the writer waits for acknowledgements, and goes
// on with them.
func TestLogJournalBackPressure(t *testing.T) {
	j := testJournal(t)
	j.limit, j.segsz = 2000, 500
	wrote := make(chan int, 1000)
	go func() {
		for i := range 400 {
			if j.append(line(strings.Repeat("x", 50))) != nil {
				return
			}
			wrote <- i
		}
		j.append(&agentapi.LogRecord{Eof: true})
	}()
	time.Sleep(50 * time.Millisecond)
	if n := len(wrote); n < 10 || n > 60 {
		t.Fatalf("%d records were taken without an acknowledgement", n)
	}
	n := 0
	err := j.follow(1, nil, records(func(r *agentapi.LogRecord) error {
		n++
		j.ack(r.Offset)
		return nil
	}), noIdle)
	if err != nil || n != 401 {
		t.Errorf("%d records, %v", n, err)
	}
	if j.bytes > 2*j.segsz {
		t.Errorf("%d bytes are kept of what was acknowledged", j.bytes)
	}
}

func TestLogJournalCloses(t *testing.T) {
	j := testJournal(t)
	j.append(line("one"))
	ended := make(chan error)
	go func() { ended <- j.follow(2, nil, records(func(*agentapi.LogRecord) error { return nil }), noIdle) }()
	time.Sleep(10 * time.Millisecond)
	j.close()
	if err := <-ended; !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if j.append(line("two")) == nil {
		t.Error("a closed journal took a record")
	}
}

// records decodes what follow gives.
func records(each func(*agentapi.LogRecord) error) func([]byte) error {
	return func(frames []byte) error {
		for r := bytes.NewReader(frames); r.Len() > 0; {
			rec := &agentapi.LogRecord{}
			if err := agentapi.ReadMessage(r, rec); err != nil {
				return err
			}
			if err := each(rec); err != nil {
				return err
			}
		}
		return nil
	}
}

func TestExitJournal(t *testing.T) {
	j := newExitJournal()
	j.append(&agentapi.ExitRecord{ContainerId: "c"})
	for range maxExits + 10 {
		j.append(&agentapi.ExitRecord{ContainerId: "c", ExecId: "e"})
	}
	got, _ := j.since(0)
	if len(got) != maxExits || got[0].ExecId != "" {
		t.Errorf("%d records, the first %v", len(got), got[0])
	}
	j.ack(got[10].Offset)
	if rest, _ := j.since(0); len(rest) != maxExits-11 {
		t.Errorf("%d records after acknowledging", len(rest))
	}
	next := j.next
	time.AfterFunc(10*time.Millisecond, func() { j.append(&agentapi.ExitRecord{ContainerId: "late"}) })
	seen := errors.New("seen")
	err := j.follow(next, nil, func(r *agentapi.ExitRecord) error {
		if r.ContainerId != "late" {
			t.Errorf("an old record: %v", r)
		}
		return seen
	}, noIdle)
	if err != seen {
		t.Error(err)
	}
}

func TestLineSplitter(t *testing.T) {
	long := strings.Repeat("y", 2*agentapi.MaxLine+5)
	exact := strings.Repeat("z", agentapi.MaxLine)
	input := "a\n\nb c\n" + long + "\n" + exact + "\nend"
	type rec struct {
		line    string
		partial bool
	}
	want := []rec{{"a", false}, {"", false}, {"b c", false},
		{long[:agentapi.MaxLine], true}, {long[:agentapi.MaxLine], true}, {"yyyyy", false}, {exact, false}, {"end", false}}
	for round := range 20 {
		var l lineSplitter
		var got []rec
		add := func(rs []*agentapi.LogRecord) {
			for _, r := range rs {
				got = append(got, rec{string(r.Line), r.Partial})
			}
		}
		for p := []byte(input); len(p) > 0; {
			n := len(p)
			if round > 0 {
				n = 1 + rand.IntN(min(n, 40_000))
			}
			add(l.split(bytes.Clone(p[:n]), 1))
			p = p[n:]
		}
		add(l.rest(1))
		if !slices.Equal(got, want) {
			t.Fatalf("%d records, want %d", len(got), len(want))
		}
	}
}

// A pod that has filled its disk loses no line of its log: what the disk does
// not take waits in memory, and no longer than the host needs to read it.
func TestLogJournalOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("atoll-test", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	j, err := newLogJournal(dir + "/j")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(j.close)
	const n = 4000
	long := strings.Repeat("x", 200)
	go func() {
		for i := range n {
			if i == 20 {
				_ = os.WriteFile(dir+"/full", make([]byte, 1<<20), 0o600) // fails when all is taken
			}
			if err := j.append(line(long)); err != nil {
				t.Error(err)
			}
			if i == n/2 {
				os.Remove(dir + "/full")
			}
		}
		j.append(&agentapi.LogRecord{Eof: true})
	}()
	next := uint64(1)
	err = j.follow(0, nil, records(func(r *agentapi.LogRecord) error {
		if r.Offset != next || !r.Eof && string(r.Line) != long {
			t.Fatalf("record %d comes where %d should", r.Offset, next)
		}
		j.mu.Lock()
		held := j.spareBytes()
		j.mu.Unlock()
		if held > 2*spareSize+agentapi.MaxMessage {
			t.Fatalf("%d bytes wait in memory", held)
		}
		if next++; next%50 == 0 {
			j.ack(r.Offset)
		}
		return nil
	}), noIdle)
	if err != nil || next != n+2 {
		t.Errorf("%d of %d records, %v", next-1, n+1, err)
	}
}
