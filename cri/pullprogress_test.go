package cri

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/openatoll/atoll/storage"
)

type lockedText struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestPullReport(t *testing.T) {
	var text lockedText
	s := &Server{log: slog.New(slog.NewTextHandler(&text, nil))}
	quick := s.reportPull("quick", time.Hour)
	quick.end()
	r := s.reportPull("registry/large:1", 5*time.Millisecond)
	r.set(storage.Progress{Stage: "fetching", Bytes: 10, Total: 40})
	eventually(t, "two lines", func() bool { return strings.Count(text.String(), "image is being pulled") >= 2 })
	r.end()
	after := text.String()
	if !strings.Contains(after, "image=registry/large:1 stage=fetching bytes=10 total=40") || strings.Contains(after, "quick") {
		t.Errorf("log:\n%s", after)
	}
	time.Sleep(30 * time.Millisecond)
	if text.String() != after {
		t.Errorf("it goes on after the end:\n%s", text.String())
	}
}
