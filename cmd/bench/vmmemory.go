package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// A vmMemory is the PSS in MiB of a VM's process: of the guest's RAM, of code
// that TCG has translated and its tables of that, neither of which there is any
// of under KVM, and of the rest.
type vmMemory struct{ monitor, code, tables, guest float64 }

// guestMapping is the least size in kB of a mapping without a name that is taken
// for RAM of a guest. QEMU's others of that size are arenas that are not backed.
const guestMapping = 32 << 10

func memoryOf(pid int) (m vmMemory, err error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	f, err := os.Open(filepath.Join(dir, "smaps"))
	if err != nil {
		return m, err
	}
	defer f.Close()
	maps, err := readMappings(f)
	if err != nil {
		return m, err
	}
	m = sumOf(maps)
	if m.code > 0 {
		if m.tables, err = translationTables(filepath.Join(dir, "mem"), maps); err != nil {
			return m, fmt.Errorf("TCG's tables in QEMU %d: %w", pid, err)
		}
		m.monitor -= m.tables
	}
	return m, nil
}

// A mapping is one of a process's.
type mapping struct {
	first, end uint64
	perms      string
	name       string
	pss        float64 // kB
}

func (m mapping) kb() float64 { return float64(m.end-m.first) / 1024 }

// code says whether it is of code that the process wrote itself.
func (m mapping) code() bool { return strings.Contains(m.perms, "x") && m.name == "" }

// guest says whether it is RAM of a guest.
func (m mapping) guest() bool {
	return !strings.Contains(m.perms, "x") && (strings.HasPrefix(m.name, "/memfd:") || m.kb() >= guestMapping && m.name != "[heap]")
}

// sumOf is what mappings take; tables are in the monitor's part.
func sumOf(maps []mapping) (out vmMemory) {
	for _, m := range maps {
		switch {
		case m.code():
			out.code += m.pss / 1024
		case m.guest():
			out.guest += m.pss / 1024
		default:
			out.monitor += m.pss / 1024
		}
	}
	return out
}

// readMappings reads the format of /proc/PID/smaps.
func readMappings(f io.Reader) (maps []mapping, err error) {
	s := bufio.NewScanner(f)
	for s.Scan() {
		fields := strings.Fields(s.Text())
		switch {
		case len(fields) >= 5 && strings.Contains(fields[0], "-") && !strings.HasSuffix(fields[0], ":"):
			m := mapping{perms: fields[1], name: strings.Join(fields[5:], " ")}
			if _, err := fmt.Sscanf(fields[0], "%x-%x", &m.first, &m.end); err != nil {
				return nil, fmt.Errorf("smaps: %q: %w", s.Text(), err)
			}
			maps = append(maps, m)
		case len(fields) >= 2 && fields[0] == "Pss:" && len(maps) > 0:
			if maps[len(maps)-1].pss, err = strconv.ParseFloat(fields[1], 64); err != nil {
				return nil, fmt.Errorf("smaps: %q: %w", s.Text(), err)
			}
		}
	}
	return maps, s.Err()
}

// Two kinds of entries lead QEMU to code that it has translated, one of each a
// piece of code: a node of GLib's balanced tree, by the code's address
// (tcg/tcg.c, tcg_tb_insert), and a slot of a hash table's bucket, by the guest's
// (util/qht.c, struct qht_bucket). Both hold pointers to what describes the code,
// which lies in front of it.
const (
	// A node is a block of malloc's for 40 bytes: its size, which has flags in
	// its three low bits, then key and value.
	nodeBytes = 48
	// A bucket is aligned to its size: a lock, a sequence, four hashes, four
	// pointers and that to the next.
	bucketBytes    = 64
	bucketPointers = 24
)

// translationTables is how much of a QEMU's memory (/proc/PID/mem), in MiB, such nodes and
// buckets are that hold something. Empty buckets are not counted, nor is what
// lies between nodes, so that it is the least that these tables take.
func translationTables(mem string, maps []mapping) (float64, error) {
	memory, err := os.Open(mem)
	if err != nil {
		return 0, err
	}
	defer memory.Close()
	var code []mapping
	for _, m := range maps {
		if m.code() {
			code = append(code, m)
		}
	}
	total := 0
	for _, m := range maps {
		if m.code() || m.guest() || m.pss == 0 || m.name != "" && m.name != "[heap]" || !strings.HasPrefix(m.perms, "rw") {
			continue
		}
		data := make([]byte, m.end-m.first)
		n, err := memory.ReadAt(data, int64(m.first))
		if err != nil && !errors.Is(err, io.EOF) && n == 0 {
			return 0, err
		}
		total += tableBytes(data[:n], code)
	}
	return float64(total) / (1 << 20), nil
}

// tableBytes counts what of a process's memory, from the beginning of a page on,
// is nodes and buckets that lead to code.
func tableBytes(data []byte, code []mapping) (bytes int) {
	word := func(at int) uint64 { return binary.LittleEndian.Uint64(data[at:]) }
	leads := func(at int) bool {
		p := word(at)
		for _, c := range code {
			if c.first <= p && p < c.end {
				return true
			}
		}
		return false
	}
	for at := 0; at+nodeBytes <= len(data); at += 8 {
		switch {
		case word(at)&^7 == nodeBytes && leads(at+8) && leads(at+16):
			bytes += nodeBytes
			at += nodeBytes - 8
		case at%bucketBytes == 0 && at+bucketBytes <= len(data) && leads(at+bucketPointers) && bucketHolds(data[at:at+bucketBytes], leads, at):
			bytes += bucketBytes
			at += bucketBytes - 8
		}
	}
	return bytes
}

// bucketHolds says whether each slot of a bucket has a hash and a pointer to
// code, or neither. at is where it lies.
func bucketHolds(bucket []byte, leads func(at int) bool, at int) bool {
	for slot := range 4 {
		hash := binary.LittleEndian.Uint32(bucket[8+4*slot:])
		p := binary.LittleEndian.Uint64(bucket[bucketPointers+8*slot:])
		if p == 0 && hash != 0 || p != 0 && !leads(at+bucketPointers+8*slot) {
			return false
		}
	}
	return true
}
