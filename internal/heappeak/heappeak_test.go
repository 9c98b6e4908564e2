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
	if got < size || got > 2*size {
		t.Errorf("%d bytes (%v), want %d and little more", got, b, size)
	}
}
