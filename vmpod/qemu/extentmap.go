package qemu

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/holes"
)

// QEMU is told which parts of a disk hold data by a bitmap, and takes one that it
// has not made itself from a qcow2 file alone: so that is what it is given, one
// without a disk's content (QEMU's docs/interop/qcow2.txt).

// An extent is a part of a file, in bytes.
type extent struct{ start, end int64 }

const (
	mapClusterBits = 16
	mapCluster     = 1 << mapClusterBits
	// copyGrain is in what units QEMU copies, in bytes: the least that
	// blockdev-backup does (BACKUP_CLUSTER_SIZE_DEFAULT).
	copyGrain = 64 << 10
	// maxMapBits bounds a bitmap; larger disks have a coarser one.
	maxMapBits = 16 << 20
	mapName    = "data"
)

// grainBits is how much of a disk of so many bytes one bit stands for, as a
// power of two.
func grainBits(size int64) int {
	bits := 16 // copyGrain
	for size>>bits > maxMapBits {
		bits++
	}
	return bits
}

// writeExtentMap writes a qcow2 file of size bytes, a disk without content, with
// a bitmap called mapName of the extents.
func writeExtentMap(w io.WriterAt, size int64, extents []extent) error {
	units := func(n, unit int64) int64 { return (n + unit - 1) / unit }
	grain := grainBits(size)
	// Each entry of the first table stands for a cluster of entries of clusters.
	entries := units(size, mapCluster/8*mapCluster)
	bitmap := make([]byte, units(units(units(size, 1<<grain), 8), mapCluster)*mapCluster)
	for _, x := range extents {
		for bit := x.start >> grain; bit < units(x.end, 1<<grain); bit++ {
			bitmap[bit/8] |= 1 << (bit % 8)
		}
	}
	clusters := int64(len(bitmap) / mapCluster)
	const refcounts, table = 1, 2 // in clusters
	directory := table + units(entries*8, mapCluster)
	index := directory + 1
	data := index + units(clusters*8, mapCluster)

	be := binary.BigEndian
	d := be.AppendUint64(nil, uint64(index)*mapCluster)
	d = be.AppendUint32(d, uint32(clusters))
	d = be.AppendUint32(d, 0)     // flags
	d = append(d, 1, byte(grain)) // a dirty tracking bitmap
	d = be.AppendUint16(d, uint16(len(mapName)))
	d = be.AppendUint32(d, 0) // no extra data
	d = append(d, mapName...)
	d = append(d, make([]byte, -len(d)&7)...)

	h := be.AppendUint32(nil, 0x514649fb) // "QFI\xfb"
	h = be.AppendUint32(h, 3)             // version
	h = be.AppendUint64(h, 0)             // no backing file
	h = be.AppendUint32(h, 0)
	h = be.AppendUint32(h, mapClusterBits)
	h = be.AppendUint64(h, uint64(size))
	h = be.AppendUint32(h, 0) // not encrypted
	h = be.AppendUint32(h, uint32(entries))
	h = be.AppendUint64(h, table*mapCluster)
	h = be.AppendUint64(h, refcounts*mapCluster)
	h = be.AppendUint32(h, 1) // clusters of them
	h = be.AppendUint32(h, 0) // no snapshots
	h = be.AppendUint64(h, 0)
	h = be.AppendUint64(h, 0)          // incompatible features
	h = be.AppendUint64(h, 0)          // compatible ones
	h = be.AppendUint64(h, 1)          // autoclear: the bitmaps are consistent
	h = be.AppendUint32(h, 4)          // refcounts have 16 bits
	h = be.AppendUint32(h, 104)        // the header's length
	h = be.AppendUint32(h, 0x23852875) // extension: bitmaps
	h = be.AppendUint32(h, 24)         // its length
	h = be.AppendUint32(h, 1)          // one bitmap
	h = be.AppendUint32(h, 0)          // reserved
	h = be.AppendUint64(h, uint64(len(d)))
	h = be.AppendUint64(h, uint64(directory)*mapCluster)
	h = be.AppendUint64(h, 0) // no more extensions

	var t []byte
	for i := range clusters {
		t = be.AppendUint64(t, uint64(data+i)*mapCluster)
	}
	for _, part := range []struct {
		at int64
		b  []byte
	}{{0, h}, {directory * mapCluster, d}, {index * mapCluster, t}, {data * mapCluster, bitmap}} {
		if _, err := w.WriteAt(part.b, part.at); err != nil {
			return err
		}
	}
	return nil
}

// extentMap is a file in memory with a map of the data in f, whose first size
// bytes are a disk. It is open for reading.
func extentMap(f *os.File, size int64) (*os.File, error) {
	var extents []extent
	err := holes.Data(f, size, func(start, end int64) error {
		extents = append(extents, extent{start, end})
		return nil
	})
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("extents", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	m := os.NewFile(uintptr(fd), "extents")
	defer m.Close()
	if err := writeExtentMap(m, size, extents); err != nil {
		return nil, fmt.Errorf("map of %s: %w", f.Name(), err)
	}
	// An fdset's member must have the access mode that QEMU asks for.
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", m.Fd()))
}
