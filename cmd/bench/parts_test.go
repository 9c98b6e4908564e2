package main

import (
	"encoding/binary"
	"path/filepath"
	"strings"
	"testing"

	"github.com/openatoll/atoll/api/v1alpha1"
)

func TestCovered(t *testing.T) {
	phases := []v1alpha1.StartPhase{
		{Name: "queue", From: 0, Took: 50}, {Name: "network", From: 10, Took: 20}, {Name: "vm", From: 15, Took: 100},
		{Name: "agent", From: 115, Took: 35}, {Name: "vm", From: 20, Took: 10}, {Name: "container", From: 200, Took: 40},
	}
	for _, tc := range []struct {
		names []string
		want  float64
	}{
		{nil, 0},
		{[]string{"queue"}, 50},
		{[]string{"vm", "network"}, 105},
		{[]string{"network", "vm", "agent", "container"}, 180},
	} {
		if got := covered(phases, tc.names...); got != tc.want {
			t.Errorf("%v covers %v ms, want %v", tc.names, got, tc.want)
		}
	}
}

func TestReadMemory(t *testing.T) {
	const smaps = `55d0c0000000-55d0c0800000 r-xp 00000000 fe:00 1234                       /usr/bin/qemu-system-x86_64
Size:               8192 kB
Pss:                1024 kB
Pss_Dirty:             0 kB
7f0000000000-7f0010000000 rw-p 00000000 00:01 2049                       /memfd:atoll-template (deleted)
Size:             262144 kB
Pss:               10240 kB
7f0020000000-7f0022000000 rwxp 00000000 00:00 0
Size:              32768 kB
Pss:                2048 kB
7f0030000000-7f0040000000 rw-p 00000000 00:00 0
Size:             262144 kB
Pss:                4096 kB
7f0050000000-7f0050021000 rw-p 00000000 00:00 0                          [heap]
Size:             132000 kB
Pss:                 512 kB
`
	maps, err := readMappings(strings.NewReader(smaps))
	if m := sumOf(maps); err != nil || m != (vmMemory{monitor: 1.5, code: 2, guest: 14}) {
		t.Errorf("%+v, %v", m, err)
	}
}

func TestTableBytes(t *testing.T) {
	code := []mapping{{first: 0x7000, end: 0x9000, perms: "rwxp"}}
	data := make([]byte, 4096)
	put := func(at int, words ...uint64) {
		for i, w := range words {
			binary.LittleEndian.PutUint64(data[at+8*i:], w)
		}
	}
	put(8, nodeBytes|1, 0x7010, 0x7000)               // a node
	put(128, 1<<33, 0x2222_1111, 0, 0x8000, 0x8ff8)   // a bucket with two hashes in one word
	binary.LittleEndian.PutUint32(data[128+12:], 0x1) // and the first's slot
	put(512, nodeBytes|1, 0x6ff8, 0x7000)             // its key is not of code
	put(1024, 0, 0, 0, 0x8000, 0x1234)                // a pointer to elsewhere
	put(2048, 64|1, 0x7010, 0x7000)                   // a block of another size
	put(3072, 0, 1<<32, 0, 0x8000, 0)                 // a hash without a pointer
	if got := tableBytes(data, code); got != nodeBytes+bucketBytes {
		t.Errorf("%d bytes, want a node and a bucket: %d", got, nodeBytes+bucketBytes)
	}
}

func TestWanted(t *testing.T) {
	for _, tc := range []struct {
		only, part string
		want       bool
	}{
		{"", "machines", true}, {"", "density", false}, {"density", "density", true}, {"density", "machines", false}, {"logs,lists", "lists", true},
	} {
		if got := (options{only: tc.only}).wanted(tc.part); got != tc.want {
			t.Errorf("-only %q wants %s: %t", tc.only, tc.part, got)
		}
	}
}

func TestAddTo(t *testing.T) {
	file := filepath.Join(t.TempDir(), "bench.json")
	h := host{Accelerator: "tcg", GuestFlavour: "stock"}
	whole := report{Format: reportFormat, Host: h, Seconds: 5, Figures: results{*figure("a", "ms", 1), *figure("b", "ms", 1)}}
	if err := writeJSON(file, whole); err != nil {
		t.Fatal(err)
	}
	part := report{Format: reportFormat, Host: h, Seconds: 2, Parts: []string{"p"}, Figures: results{*figure("b", "ms", 7), *figure("c", "ms", 1)}}
	got, err := part.addTo(file)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Figures) != 3 || got.Figures.find("b").Median != 7 || got.Seconds != 7 || len(got.Parts) != 0 {
		t.Errorf("together: %+v", got)
	}
	part.Host.Accelerator = "kvm"
	if _, err := part.addTo(file); err == nil {
		t.Error("figures of another kind of host were added")
	}
}
