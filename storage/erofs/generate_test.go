package erofs

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"path"
	"strings"
	"testing"
	"time"
)

// A generator makes random layers out of few names, so that they get into each
// other's way.
type generator struct {
	*rand.Rand
	used   map[string]bool // paths of the layer at hand, and their parents
	files  []string        // names that were files once, for hard links
	here   []string        // those of the layer at hand
	links  map[string]bool // names that may be symlinks
	leaves map[string]bool // names that may be something else than directories and symlinks
}

func newGenerator(seed uint64) *generator {
	return &generator{Rand: rand.New(rand.NewPCG(seed, 0)), links: map[string]bool{}, leaves: map[string]bool{}}
}

type layerKind int

const (
	plain layerKind = iota
	withWhiteouts
	withOpaques
	throughLinks
)

func pick[T any](g *generator, list ...T) T { return list[g.IntN(len(list))] }

func (g *generator) name() string {
	return pick(g, "a", "b", "c", "d", ".e", pick(g, "f", strings.Repeat("long", 40)))
}

func (g *generator) path() string {
	parts := make([]string, 1+g.IntN(4))
	for i := range parts {
		parts[i] = g.name()
	}
	return strings.Join(parts, "/")
}

// layer makes the entries of one layer. It keeps off some things that
// containerd does by accident rather than by intent: no path twice in a layer,
// no whiteout of what the same layer has, all parents named in a layer that
// has opaque markers. Since symlinks would bring that about, paths go through
// them only in layers of their own, which name no directories either.
func (g *generator) layer() []entryTar {
	g.used, g.here = map[string]bool{}, nil
	var entries []entryTar
	kind := pick(g, plain, withWhiteouts, withWhiteouts, withOpaques, throughLinks)
	for range 1 + g.IntN(25) {
		p := g.path()
		if g.busy(p) || kind != throughLinks && g.below(g.links, p) || g.IntN(10) > 0 && g.below(g.leaves, p) {
			continue
		}
		if kind == withOpaques || kind != throughLinks && g.IntN(2) == 0 {
			for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
				if !g.used[dir] {
					g.used[dir] = true
					// parents first
					entries = append(entries, entryTar{hdr: g.attributes(tar.Header{Name: dir + "/", Typeflag: tar.TypeDir})})
				}
			}
			entries = parentsFirst(entries)
		}
		e := g.entry(p, kind)
		if e.hdr.Typeflag != tar.TypeDir && e.hdr.Typeflag != tar.TypeSymlink {
			g.leaves[p] = true
		}
		g.mark(p)
		entries = append(entries, e)
	}
	return entries
}

// parentsFirst keeps the order of entries except that directories come before
// what is in them.
func parentsFirst(entries []entryTar) []entryTar {
	for i := range entries {
		for j := i + 1; j < len(entries); j++ {
			if strings.HasPrefix(entries[i].hdr.Name, entries[j].hdr.Name) && strings.HasSuffix(entries[j].hdr.Name, "/") {
				e := entries[j]
				copy(entries[i+1:j+1], entries[i:j])
				entries[i] = e
			}
		}
	}
	return entries
}

// busy tells whether the layer has p, something below it, or a file above.
func (g *generator) busy(p string) bool {
	for u := range g.used {
		if u == p || strings.HasPrefix(u, p+"/") {
			return true
		}
	}
	for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
		if g.used[dir+"\x00"] {
			return true
		}
	}
	return false
}

// below tells whether p is below one of the names.
func (g *generator) below(names map[string]bool, p string) bool {
	for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
		if names[dir] {
			return true
		}
	}
	return false
}

func (g *generator) mark(p string) {
	for dir := p; dir != "."; dir = path.Dir(dir) {
		g.used[dir] = true
	}
	g.used[p+"\x00"] = true
}

type entryTar struct {
	hdr  tar.Header
	body []byte
}

func (g *generator) entry(p string, kind layerKind) entryTar {
	dir, base := path.Split(p)
	switch n := g.IntN(20); {
	case n < 3 && (kind == withWhiteouts || kind == withOpaques):
		return entryTar{hdr: tar.Header{Name: dir + ".wh." + base, Mode: 0o644, Typeflag: tar.TypeReg}}
	case n < 4 && kind == withOpaques && dir != "":
		return entryTar{hdr: tar.Header{Name: dir + ".wh..wh..opq", Typeflag: tar.TypeReg}}
	case n < 7 && kind != throughLinks:
		return entryTar{hdr: g.attributes(tar.Header{Name: p + "/", Typeflag: tar.TypeDir})}
	case n < 9:
		g.links[p] = true
		target := pick(g, "a", "b", "../a", "../../b/c", "/a/b", "/c", "..", ".", "a/b/c", "/", "nowhere/at/all", "../../../../d")
		return entryTar{hdr: g.attributes(tar.Header{Name: p, Typeflag: tar.TypeSymlink, Linkname: target})}
	case n < 12 && len(g.here) > 0:
		g.links[p] = true
		target := pick(g, g.here...)
		if g.IntN(10) == 0 { // a lower layer's, which may be gone
			target = pick(g, g.files...)
		}
		return entryTar{hdr: g.attributes(tar.Header{Name: p, Typeflag: tar.TypeLink, Linkname: target})}
	case n < 13:
		return entryTar{hdr: g.attributes(tar.Header{Name: p, Typeflag: pick(g, byte(tar.TypeChar), tar.TypeBlock), Devmajor: g.Int64N(4096), Devminor: g.Int64N(1 << 20)})}
	case n < 14:
		return entryTar{hdr: g.attributes(tar.Header{Name: p, Typeflag: tar.TypeFifo})}
	}
	g.files, g.here = append(g.files, p), append(g.here, p)
	body := make([]byte, pick(g, 0, 1, 100, 4095, 4096, 4097, 20000))
	if g.IntN(3) > 0 {
		for i := range body {
			body[i] = byte(g.IntN(256))
		}
	} else if len(body) > 5000 {
		copy(body[len(body)-3000:], "behind a hole")
	}
	return entryTar{hdr: g.attributes(tar.Header{Name: p, Typeflag: tar.TypeReg, Size: int64(len(body))}), body: body}
}

func (g *generator) attributes(hdr tar.Header) tar.Header {
	hdr.Mode = g.Int64N(0o10000)
	if hdr.Typeflag == tar.TypeDir {
		hdr.Mode &^= 0o2000 // or the kernel gives directories that no layer names its group
	}
	hdr.Uid, hdr.Gid = pick(g, 0, 1000, 70000, 1<<31), pick(g, 0, 5, 65535, 65536)
	hdr.ModTime = time.Unix(g.Int64N(1e9), pick(g, 0, g.Int64N(1e9)))
	hdr.Format = tar.FormatPAX
	if hdr.Typeflag == tar.TypeReg || hdr.Typeflag == tar.TypeDir {
		for range g.IntN(4) - 1 {
			if hdr.PAXRecords == nil {
				hdr.PAXRecords = map[string]string{}
			}
			hdr.PAXRecords[paxXattr+"user."+pick(g, "color", "origin", strings.Repeat("k", 100))] = strings.Repeat("v", g.IntN(300))
		}
	}
	return hdr
}

// pack makes a tar of entries, and sometimes names them in other ways.
func (g *generator) pack(t testing.TB, entries []entryTar) []byte {
	prefix := pick(g, "", "", "./", "/")
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		e.hdr.Name = prefix + e.hdr.Name
		if err := tw.WriteHeader(&e.hdr); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func (g *generator) stack(t testing.TB) [][]byte {
	layers := make([][]byte, 1+g.IntN(6))
	for i := range layers {
		layers[i] = g.pack(t, g.layer())
	}
	return layers
}

func bytesLayer(name string, data []byte) Layer {
	return Layer{Name: name, Open: func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }}
}

func bytesLayers(stack [][]byte) []Layer {
	var layers []Layer
	for i, data := range stack {
		layers = append(layers, bytesLayer(fmt.Sprint("layer ", i+1), data))
	}
	return layers
}

// list renders a stack for a failing test.
func list(stack [][]byte) string {
	var b strings.Builder
	for i, data := range stack {
		fmt.Fprintf(&b, "layer %d\n", i+1)
		tr := tar.NewReader(bytes.NewReader(data))
		for {
			hdr, err := tr.Next()
			if err != nil {
				break
			}
			fmt.Fprintf(&b, "  %c %.60s -> %.60s %o %d\n", hdr.Typeflag, hdr.Name, hdr.Linkname, hdr.Mode, hdr.Size)
		}
	}
	return b.String()
}
