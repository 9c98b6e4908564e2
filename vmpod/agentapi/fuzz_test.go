package agentapi

import (
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// FuzzGuest has a guest answer the host's attach, then send any bytes, while
// the host makes calls and reads streams: whatever comes, all of it ends, with
// a class, and no goroutine stays.
func FuzzGuest(f *testing.F) {
	const accept = "\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x04\x00\x00\x00\x00" // the stream of calls
	f.Add([]byte(""))
	f.Add([]byte(accept))
	f.Add([]byte(accept + "\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x0a\x00\x00\x00\x00\x00\x00\x00\x01\x02\x00"))
	f.Add([]byte(accept + "\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x0c\x00\x00\x00\x02\x00\x00\x00\x01\x02\x00\x12\x00"))
	f.Add([]byte(accept + "\x00\x01\x00\x04\x00\x00\x00\x01\x00\x00\x00\x00"))
	f.Add([]byte(accept + "\x00\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02"))
	f.Add([]byte("\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x06\x00\x00\x00\x02\x08\xff"))
	f.Add([]byte("\x00\x00\x00\x00\x00\x00\x00\x07\xff\xff\xff\xff"))
	before := runtime.NumGoroutine()
	f.Fuzz(func(t *testing.T, wire []byte) {
		guest, host := net.Pipe()
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			b := make([]byte, markerLen)
			if _, err := io.ReadFull(guest, b); err != nil {
				return
			}
			id, _ := parseBody(b[len(prefix)+1:])
			go io.Copy(io.Discard, guest)
			guest.Write(appendMarker(nil, kindEcho, id))
			guest.Write(wire)
			guest.Close()
		}()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		c, err := Attach(ctx, host)
		if err == nil {
			if _, err := c.Hello(ctx, &HelloRequest{}); err == nil {
				t.Log("a call was answered")
			}
			for range c.Exits(ctx, 0) {
			}
			for range c.Logs(ctx, "c", 0) {
			}
			_, err = c.CopyOut(ctx, "c", "/x", 10)
			<-c.Done()
			c.Close()
		}
		if err != nil && !errdefs.IsUnavailable(err) && !errors.Is(err, ErrMisbehaved) && !errdefs.IsUnknown(err) && !errdefs.IsInvalidArgument(err) {
			t.Errorf("ended with %v, which has no class", err)
		}
		if ctx.Err() != nil {
			t.Error("it ended by its deadline alone")
		}
		<-sent
		for end := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before+6; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				buf := make([]byte, 1<<18)
				t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
			}
		}
	})
}
