package cri

import (
	"context"
	"errors"
	"testing"
	"time"
)

// Those who ask side by side share one reading, and one that failed holds
// nobody up.
func TestLastReadingIsShared(t *testing.T) {
	l := newLastReading()
	ctx := t.Context()
	if r, err := l.take(ctx); r != nil || err != nil {
		t.Fatalf("the first caller got %v, %v", r, err)
	}
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if _, err := l.take(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a caller whose time is over: %v", err)
	}
	got := make(chan *reading)
	go func() {
		r, err := l.take(ctx)
		if err != nil {
			t.Error(err)
		}
		got <- r
	}()
	made := &reading{at: time.Now()}
	l.give(made)
	if r := <-got; r == nil || !r.at.Equal(made.at) || r == made {
		t.Errorf("the second caller got %v, want a copy of the first one's", r)
	}
	l.last.at = l.last.at.Add(-statsFresh)
	if r, err := l.take(ctx); r != nil || err != nil {
		t.Fatalf("an old reading was shared: %v, %v", r, err)
	}
	l.give(nil) // it failed
	if r, err := l.take(ctx); r != nil || err != nil {
		t.Fatalf("after a failure: %v, %v", r, err)
	}
	l.give(nil)
}
