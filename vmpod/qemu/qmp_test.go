package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"testing"
	"time"
)

// fakeMonitor greets, answers each command by answer's line, if any, and sends
// nothing else.
func fakeMonitor(t *testing.T, answer func(command string, id int) string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qmp")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		fmt.Fprintln(c, `{"QMP": {"version": {}, "capabilities": []}}`)
		for lines := bufio.NewScanner(c); lines.Scan(); {
			var m struct {
				Execute string `json:"execute"`
				ID      int    `json:"id"`
			}
			if json.Unmarshal(lines.Bytes(), &m) != nil {
				return
			}
			out := fmt.Sprintf(`{"return": {}, "id": %d}`, m.ID)
			if m.Execute != "qmp_capabilities" {
				out = answer(m.Execute, m.ID)
			}
			if out == "" {
				continue
			}
			if _, err := fmt.Fprintln(c, out); err != nil {
				return
			}
		}
	}()
	return path
}

func TestQMP(t *testing.T) {
	var silent int
	path := fakeMonitor(t, func(command string, id int) string {
		switch command {
		case "silent":
			silent = id
			return ""
		case "late": // the answer that silent did not get comes before this one's
			return fmt.Sprintf(`{"return": {"n": 1}, "id": %d}`+"\n"+`{"return": {"n": 2}, "id": %d}`, silent, id)
		case "refused":
			return fmt.Sprintf(`{"error": {"class": "DeviceNotFound", "desc": "no such thing"}, "id": %d}`, id)
		case "event":
			return fmt.Sprintf(`{"event": "SHUTDOWN", "data": {"guest": true}, "timestamp": {"seconds": 5, "microseconds": 7}}`+"\n"+`{"return": {}, "id": %d}`, id)
		}
		return "not JSON: the connection is of no more use"
	})
	events := make(chan qmpEvent, 1)
	q, err := dialQMP(t.Context(), path, func(e qmpEvent) { events <- e })
	if err != nil {
		t.Fatal(err)
	}
	defer q.close()
	watched, unwatch := q.watch("SHUTDOWN")
	defer unwatch()

	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := q.run(short, "silent", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a command without an answer: %v", err)
	}
	var r struct{ N int }
	if err := q.run(t.Context(), "late", nil, &r); err != nil || r.N != 2 {
		t.Fatalf("the next command got %+v, %v: the answer to another", r, err)
	}
	var refused *qmpError
	if err := q.run(t.Context(), "refused", nil, nil); !errors.As(err, &refused) || refused.Class != "DeviceNotFound" || refused.Command != "refused" {
		t.Errorf("a refused command: %v", err)
	}
	if err := q.run(t.Context(), "event", nil, nil); err != nil {
		t.Fatal(err)
	}
	for _, ch := range []<-chan qmpEvent{events, watched} {
		if e := <-ch; e.Name != "SHUTDOWN" || !e.Time.Equal(time.Unix(5, 7000)) {
			t.Errorf("event %+v", e)
		}
	}
	if err := q.run(t.Context(), "nonsense", nil, nil); !errors.Is(err, errQMPClosed) {
		t.Errorf("an answer that is not JSON: %v", err)
	}
}
