package erofs

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"runtime"
	"testing"
	"time"
)

// largeLayer streams a layer of that many files of some bytes each.
func largeLayer(files, size int) io.ReadCloser {
	r, w := io.Pipe()
	go func() {
		tw := tar.NewWriter(w)
		body := bytes.Repeat([]byte("x"), size)
		for i := range files {
			h := &tar.Header{Name: fmt.Sprintf("usr/lib/d%d/file-%d", i/100, i), Mode: 0o644, Size: int64(size)}
			if err := tw.WriteHeader(h); err != nil {
				return // the reader has gone
			}
			if _, err := tw.Write(body); err != nil {
				return
			}
		}
		w.CloseWithError(tw.Close())
	}()
	return r
}

// peak runs do and returns by how much the live heap stood above its start.
func peak(do func()) int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	start, most := int64(m.HeapAlloc), int64(m.HeapAlloc)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			runtime.ReadMemStats(&m)
			most = max(most, int64(m.HeapAlloc))
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	do()
	close(stop)
	<-done
	return most - start
}

// A conversion needs the same memory whatever the layer has; a merge needs some
// for each file, of names and attributes alone. The bounds are on the heap with
// what the collector has not yet taken, which is up to as much again.
func TestMemoryIsBounded(t *testing.T) {
	for _, c := range []struct{ files, size int }{{10_000, 100}, {100_000, 100}, {100, 4 << 20}} {
		var index bytes.Buffer
		index.Grow(8 << 20)
		var made Converted
		convert := peak(func() {
			var err error
			r := largeLayer(c.files, c.size)
			defer r.Close()
			if made, err = Convert(t.Context(), r, discardAt{}, &index, Limits{}, Limits{}.NewBudget()); err != nil {
				t.Fatal(err)
			}
		})
		merge := peak(func() {
			layers := []Indexed{{Name: "x", DiffID: made.DiffID, Data: made.Data, Open: func() (io.ReadCloser, error) {
				return io.NopCloser(bytes.NewReader(index.Bytes())), nil
			}}}
			if _, err := Merge(t.Context(), io.Discard, layers, Limits{}); err != nil {
				t.Fatal(err)
			}
		})
		t.Logf("%d files of %d bytes: converting takes %.1f MiB of heap, merging %.1f MiB (%.0f bytes a file)",
			c.files, c.size, float64(convert)/(1<<20), float64(merge)/(1<<20), float64(merge)/float64(c.files))
		if convert > 24<<20 {
			t.Errorf("converting %d files of %d bytes takes %d MiB of heap", c.files, c.size, convert>>20)
		}
		if merge > 8<<20+int64(c.files)*1200 {
			t.Errorf("merging %d files takes %d MiB of heap", c.files, merge>>20)
		}
	}
}
