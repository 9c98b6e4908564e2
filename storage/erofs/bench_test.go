package erofs

import (
	"archive/tar"
	"bytes"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"testing"
)

// BenchmarkBuild converts an image of 1 GiB with 100,000 files, uncompressed.
func BenchmarkBuild(b *testing.B) {
	const files, mib = 100_000, 1024
	var layer bytes.Buffer
	tw := tar.NewWriter(&layer)
	rnd := rand.NewChaCha8([32]byte{})
	body := make([]byte, 1<<20)
	_, _ = rnd.Read(body)
	add := func(name string, n int) {
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(n)}); err != nil {
			b.Fatal(err)
		}
		if _, err := tw.Write(body[:n]); err != nil {
			b.Fatal(err)
		}
	}
	for i := range files {
		add(fmt.Sprintf("usr/lib/d%d/file-%d", i/100, i), 2000+i%3000)
	}
	for i := range mib - layer.Len()>>20 {
		add(fmt.Sprintf("opt/large/%d", i), 1<<20)
	}
	if err := tw.Close(); err != nil {
		b.Fatal(err)
	}
	dir := b.TempDir()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	b.SetBytes(int64(layer.Len()))
	for b.Loop() {
		if _, err := Build(b.Context(), filepath.Join(dir, "image"), []Layer{bytesLayer("x", layer.Bytes())}, Limits{}); err != nil {
			b.Fatal(err)
		}
	}
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.Sys-before.Sys)/1e6, "MB-more")
	b.ReportMetric(float64(blocks(b, filepath.Join(dir, "image"))*512)/1e6, "MB-disk")
}
