package keyqueue

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"testing"
	"time"
)

// What failed is looked at again, until ctx ends.
func TestRun(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	q := New(time.Millisecond, time.Millisecond)
	q.Add("a")
	var looked []string
	Run(ctx, q, slog.New(slog.DiscardHandler), "thing", func(_ context.Context, key string) error {
		looked = append(looked, key)
		if len(looked) < 3 {
			return errors.New("not yet")
		}
		cancel()
		return nil
	})
	if !slices.Equal(looked, []string{"a", "a", "a"}) || !q.ShuttingDown() {
		t.Errorf("looked at %q", looked)
	}
}
