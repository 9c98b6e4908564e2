package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"
)

// treeLayers are four layers, packed in three ways, with what is awkward in
// file systems and in their merging, and more than Docker builds (127), each
// with a file of its own and a change of the last one's.
func (in *inputs) treeLayers() []packed {
	layers := []packed{
		{in.treeBase(), types.OCILayer},
		{treeChanges(), types.OCILayerZStd},
		{treeOpaque(), types.OCIUncompressedLayer},
		{treeLast(), types.OCILayer},
	}
	for i := range 126 {
		l := newLayer().dir("t", 0o755).dir("t/layers", 0o755)
		l.file(fmt.Sprintf("t/layers/%d", i), 0o644, bytes.Repeat([]byte(fmt.Sprint(i, " ")), 1000*(i%5)+1))
		layers = append(layers, packed{l.file("t/layers/last", 0o644, []byte(fmt.Sprint(i))), types.OCILayer})
	}
	return layers
}

func (in *inputs) treeBase() *layerTar {
	l := in.busyboxTo(skeleton())
	l.file("bin/treesum", 0o755, in.treesum)
	l.dir("t", 0o755)
	l.dir("t/modes", 0o755)
	for mode := int64(0); mode < 0o1000; mode += 0o111 {
		for _, special := range []int64{0, 0o1000, 0o2000, 0o4000} {
			l.file(fmt.Sprintf("t/modes/f%04o", mode|special), mode|special, []byte("x"))
		}
	}
	for _, mode := range []int64{0o700, 0o555, 0o1777, 0o2775, 0} {
		l.dir(fmt.Sprintf("t/modes/d%04o", mode), mode)
	}
	l.dir("t/owners", 0o755)
	for i, id := range []int{0, 1, 1000, 65534, 65535, 65536, 4294967294} {
		l.add(tar.Header{Name: fmt.Sprintf("t/owners/%d", i), Mode: 0o644, Uid: id, Gid: id / 2, Format: tar.FormatPAX}, []byte("owned"))
	}
	l.dir("t/links", 0o755)
	l.file("t/links/one", 0o644, []byte("one inode")).link("t/links/two", "t/links/one", 0o644).link("t/links/a-third", "t/links/one", 0o644)
	l.symlink("t/links/rel", "../owners/0").symlink("t/links/abs", "/t/links/one").symlink("t/links/dangling", "nowhere").symlink("t/links/loop", "loop")
	l.symlink("t/links/long", strings.Repeat("a/../", 800)+"one").symlink("t/dirlink", "links")
	l.link("t/links/same-symlink", "t/links/rel", 0o777)
	l.dir("t/sizes", 0o755)
	for _, size := range []int{0, 1, 4095, 4096, 4097, 8192, 1<<20 + 1} {
		l.file(fmt.Sprintf("t/sizes/%d", size), 0o644, bytes.Repeat([]byte("atoll "), size/6+1)[:size])
	}
	sparse := make([]byte, 8<<20)
	copy(sparse[3<<20:], "in the middle of nothing")
	l.file("t/sizes/sparse", 0o644, sparse)
	l.dir("t/gone", 0o755).file("t/gone/a", 0o644, []byte("a")).dir("t/gone/sub", 0o755).file("t/gone/sub/b", 0o644, nil)
	l.dir("t/opaque", 0o755).file("t/opaque/old", 0o644, []byte("old")).file("t/opaque/.old", 0o644, nil).dir("t/opaque/sub", 0o755).file("t/opaque/sub/old", 0o644, nil)
	l.file("t/becomes-dir", 0o644, []byte("file")).dir("t/becomes-file", 0o755).file("t/becomes-file/inside", 0o644, nil)
	return l.file("t/whited", 0o644, []byte("out"))
}

func treeChanges() *layerTar {
	l := newLayer().dir("t", 0o755)
	l.file("t/.wh.whited", 0, nil).file("t/.wh.gone", 0, nil)
	l.dir("t/becomes-dir", 0o750).file("t/becomes-dir/x", 0o600, []byte("x"))
	l.file("t/becomes-file", 0o640, []byte("now a file"))
	// A hard link to a lower layer's file, and a change of one name of three.
	l.link("t/links/across-layers", "t/links/two", 0o644)
	l.file("t/links/a-third", 0o644, []byte("an inode of its own"))
	l.file("t/dirlink/through-symlink", 0o644, []byte("lands in links"))
	l.dir("t/devices", 0o755)
	for _, d := range []struct {
		name         string
		typ          byte
		major, minor int64
	}{{"null", tar.TypeChar, 1, 3}, {"large", tar.TypeChar, 511, 1048575}, {"block", tar.TypeBlock, 253, 300}, {"fifo", tar.TypeFifo, 0, 0}} {
		l.add(tar.Header{Name: "t/devices/" + d.name, Typeflag: d.typ, Mode: 0o620, Devmajor: d.major, Devminor: d.minor, Gid: 5}, nil)
	}
	return l
}

func treeOpaque() *layerTar {
	l := newLayer().dir("t", 0o755)
	// What the marker's own layer has stays, dotfiles too, before and after.
	l.dir("t/opaque", 0o755).file("t/opaque/.before", 0o644, []byte("b")).file("t/opaque/.wh..wh..opq", 0, nil)
	l.file("t/opaque/.after", 0o644, []byte("a")).file("t/opaque/new", 0o644, []byte("new"))
	l.dir("t/names", 0o755)
	for _, name := range []string{strings.Repeat("n", 255), strings.Repeat("ü", 127), "with space", "with\ttab", "with\nnewline", `with\backslash`, `with"quote`, "-dash", "!bang", "~tilde", ".dot", "..two-dots", "日本", "\xff\xfe-not-utf8"} {
		l.add(tar.Header{Name: "t/names/" + name, Mode: 0o644, Format: tar.FormatGNU}, []byte(name))
	}
	deep := "t/deep"
	for i := range 30 {
		l.dir(deep, 0o755)
		deep += fmt.Sprintf("/%s%d", strings.Repeat("d", 60), i)
	}
	l.dir("t/many", 0o755)
	for i := range 1000 {
		l.file(fmt.Sprintf("t/many/%04d-%s", i, strings.Repeat("m", i%100)), 0o644, nil)
	}
	return l.dir("t/empty", 0o755)
}

func treeLast() *layerTar {
	l := newLayer()
	l.dir("t/gone", 0o711).file("t/gone/new", 0o644, []byte("back again"))
	l.dir("t/attributes", 0o755)
	l.add(tar.Header{Name: "t/attributes/capable", Mode: 0o755, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": capNetBindService}}, []byte("#!/bin/sh\n"))
	l.add(tar.Header{Name: "t/attributes/user", Mode: 0o644, PAXRecords: map[string]string{"SCHILY.xattr.user.color": "green", "SCHILY.xattr.user.long": strings.Repeat("v", 2000)}}, nil)
	l.add(tar.Header{Name: "t/attributes/dir/", Mode: 0o755, PAXRecords: map[string]string{"SCHILY.xattr.user.on-a": "directory"}}, nil)
	l.dir("t/times", 0o755)
	l.add(tar.Header{Name: "t/times/nano", Mode: 0o644, ModTime: time.Unix(1234567890, 123456789), Format: tar.FormatPAX}, nil)
	l.add(tar.Header{Name: "t/times/epoch", Mode: 0o644, ModTime: time.Unix(0, 0)}, nil)
	l.add(tar.Header{Name: "t/times/after-2038", Mode: 0o644, ModTime: time.Unix(1<<31+1, 0)}, nil)
	return l
}

// capNetBindService is cap_net_bind_service+ep as the kernel stores it
// (VFS_CAP_REVISION_2 and the effective bit).
const capNetBindService = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
