package cri

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// FuzzLogRecords writes whatever a guest calls a record: one line each, in
// CRI's format, with the bytes that it sent.
func FuzzLogRecords(f *testing.F) {
	f.Add(int64(0), int32(0), true, []byte("a line"))
	f.Add(int64(-1<<63), int32(77), false, []byte("two\nlines\r\x00\xff"))
	f.Add(int64(1<<63-1), int32(1), true, []byte(nil))
	f.Fuzz(func(t *testing.T, ns int64, stream int32, partial bool, line []byte) {
		path := filepath.Join(t.TempDir(), "0.log")
		l, err := openLog(path)
		if err != nil {
			t.Fatal(err)
		}
		rec := &agentapi.LogRecord{Offset: 1, TimeNs: ns, Stream: agentapi.LogRecord_Stream(stream), Partial: partial, Line: line}
		l.add(rec)
		start := l.cursor(0)
		if err := l.flush(); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Count(got, []byte("\n")) != 1 || got[len(got)-1] != '\n' {
			t.Fatalf("not one line: %q", got)
		}
		parts := bytes.SplitN(got[:len(got)-1], []byte(" "), 4)
		if len(parts) != 4 || len(parts[3]) != len(line) {
			t.Fatalf("%q for %q", got, line)
		}
		if _, err := time.Parse(time.RFC3339Nano, string(parts[0])); err != nil {
			t.Error(err)
		}
		if n, err := written(path, start); err != nil || n != 1 {
			t.Errorf("%d lines are counted, %v", n, err)
		}
		if err := l.close(); err != nil {
			t.Error(err)
		}
	})
}

// FuzzExitRecords ends a container as a guest tells it: what the record says
// then can be sent, is bounded and lies in time.
func FuzzExitRecords(f *testing.F) {
	f.Add(int64(0), int32(0), "Completed", "")
	f.Add(int64(1<<63-1), int32(-1), "no reason at all\n", "\xff\xfe")
	f.Fuzz(func(t *testing.T, ns int64, code int32, reason, message string) {
		now := time.Now()
		c := &container{CreatedAt: now.Add(-time.Minute), StartedAt: now.Add(-time.Second)}
		exited(c, &agentapi.ExitRecord{TimeNs: ns, ExitCode: code, Reason: reason, Message: message})
		if c.FinishedAt.Before(c.StartedAt) || c.FinishedAt.After(time.Now()) {
			t.Errorf("ended at %v", c.FinishedAt)
		}
		if !utf8.ValidString(c.Message) || len(c.Message) > 4096*3+4 || !utf8.ValidString(c.Reason) || len(c.Reason) > 64 || c.Reason == "" {
			t.Errorf("reason %q, %d bytes of message", c.Reason, len(c.Message))
		}
	})
}
