package image

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/storage"
)

// cutting sends a part of each blob and cuts the connection, with an end or a
// reset, until the rest is short; what is asked for by Range it gives.
func cutting(suffix string, reset bool, ranges *atomic.Int32) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if !strings.HasSuffix(req.URL.Path, suffix) {
				next.ServeHTTP(w, req)
				return
			}
			var from int
			if n, _ := fmt.Sscanf(req.Header.Get("Range"), "bytes=%d-", &from); n == 1 {
				ranges.Add(1)
			}
			rec := httptest.NewRecorder()
			req.Header.Del("Range")
			next.ServeHTTP(rec, req)
			code, whole := rec.Code, rec.Body.Bytes()
			body := whole[from:]
			if from > 0 {
				code = http.StatusPartialContent
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(whole)-1, len(whole)))
			}
			w.Header().Set("Content-Length", strconv.Itoa(len(body)))
			w.WriteHeader(code)
			if len(body) < 64<<10 {
				w.Write(body)
				return
			}
			w.Write(body[:len(body)/2])
			http.NewResponseController(w).Flush()
			if !reset {
				panic(http.ErrAbortHandler)
			}
			time.Sleep(50 * time.Millisecond) // a reset overtakes what is not read yet
			conn, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				conn.(*net.TCPConn).SetLinger(0)
				conn.Close()
			}
		})
	}
}

// A connection that is cut, again and again, goes on where it was.
func TestPullGoesOnAfterACut(t *testing.T) {
	for name, reset := range map[string]bool{"ended": false, "reset": true} {
		t.Run(name, func(t *testing.T) {
			img := build(t, layer(t, file{"a", incompressible(1 << 20)}))
			layers, _ := img.Layers()
			d, _ := layers[0].Digest()
			size, _ := layers[0].Size()
			var ranges atomic.Int32
			ref := serveImage(t, cutting(d.String(), reset, &ranges), img)
			var mu sync.Mutex
			var last storage.Progress
			s := newStore(t, Config{})
			_, err := s.Pull(t.Context(), ref, nil, func(p storage.Progress) {
				mu.Lock()
				defer mu.Unlock()
				if p.Bytes < last.Bytes || p.Bytes > p.Total {
					t.Errorf("progress %+v after %+v", p, last)
				}
				last = p
			})
			if err != nil || ranges.Load() < 3 {
				t.Fatalf("Pull = %v with %d ranges", err, ranges.Load())
			}
			if last.Stage != "done" || last.Total != size || last.Bytes < size*9/10 {
				t.Errorf("last progress %+v of %d bytes", last, size)
			}
		})
	}
}

// A registry that stops in the middle of a layer ends the pull.
func TestPullFromARegistryThatStalls(t *testing.T) {
	img := build(t, layer(t, file{"a", incompressible(1 << 20)}))
	layers, _ := img.Layers()
	d, _ := layers[0].Digest()
	ref := serveImage(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if !strings.HasSuffix(req.URL.Path, d.String()) {
				next.ServeHTTP(w, req)
				return
			}
			w.Header().Set("Content-Length", strconv.Itoa(1<<20))
			w.Write(make([]byte, 64<<10))
			http.NewResponseController(w).Flush()
			<-req.Context().Done()
		})
	}, img)
	s := newStore(t, Config{Timeouts: Timeouts{Stall: 200 * time.Millisecond}})
	if _, err := s.Pull(t.Context(), ref, nil, nil); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "no more bytes came for 200ms") {
		t.Errorf("Pull = %v, want ErrUnavailable that says for how long nothing came", err)
	}
	s.pulling.Wait()
	nothingLeft(t, s)
}
