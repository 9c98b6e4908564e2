package heappeak

import (
	"testing"
	"time"
)

func TestOf(t *testing.T) {
	const size = 64 << 20
	var b []byte
	got := Of(func() {
		b = make([]byte, size)
		time.Sleep(10 * pause)
		b = nil
	})
	// What is freed meanwhile counts against it.
	if got < size-size/16 || got > 2*size {
		t.Errorf("%d bytes (%v), want %d and little more", got, b, size)
	}
}
