package podinit

import (
	"bytes"
	"log/slog"
	"testing"
)

// A rehearsal that fails half way makes every clone slower, and nothing else
// shows it.
func TestRehearsalIsCarriedThrough(t *testing.T) {
	var log bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	defer slog.SetDefault(before)
	rehearse()
	if log.Len() > 0 {
		t.Errorf("the rehearsal said:\n%s", log.String())
	}
}
