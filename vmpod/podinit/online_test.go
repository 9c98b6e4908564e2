package podinit

import (
	"testing"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

func TestKeptMemory(t *testing.T) {
	const iomem = `00000000-00000fff : Reserved
00001000-0009fbff : System RAM
00100000-12fd7fff : System RAM
  01000000-01a00000 : Kernel code
  02000000-02000fff : System RAM
100000000-17fffffff : System RAM (virtio_mem)
`
	const ram = (0x9fbff - 0x1000 + 1) + (0x12fd7fff - 0x100000 + 1)
	for name, c := range map[string]struct {
		iomem       string
		total, want int64
	}{
		"the kernel's part":   {iomem, ram - 40<<20, 40 << 20},
		"addresses hidden":    {"00000000-00000000 : System RAM\n", 1 << 28, 0},
		"a file not there":    {"", 1 << 28, 0},
		"what is no range":    {"zz : System RAM\n10-1f : System RAM", 0, 16},
		"more than it counts": {iomem, 1 << 40, 0},
	} {
		if got := keptMemory(c.iomem, c.total); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

func TestCountRanges(t *testing.T) {
	for list, want := range map[string]int{"0": 1, "0-3": 4, "0-1,3": 3, "0-1,4-7": 6, "": 0} {
		if got := countRanges(list); got != want {
			t.Errorf("%q: %d, want %d", list, got, want)
		}
	}
}

func TestCheckShrink(t *testing.T) {
	const mib = 1 << 20
	s := &agentapi.ContainerStats{MemoryCurrent: 300 * mib, MemoryWorkingSet: 200 * mib, MemoryLimit: 400 * mib}
	for name, c := range map[string]struct {
		stats   *agentapi.ContainerStats
		value   cgroupValue
		refused bool
	}{
		"more":                  {s, cgroupValue{"memory.max", "838860800"}, false},
		"less, caches can go":   {s, cgroupValue{"memory.max", "262144000"}, false},
		"less than it uses":     {s, cgroupValue{"memory.max", "104857600"}, true},
		"none":                  {s, cgroupValue{"memory.max", "max"}, false},
		"another file":          {s, cgroupValue{"memory.low", "0"}, false},
		"the limit that it has": {&agentapi.ContainerStats{MemoryWorkingSet: 10, MemoryLimit: 8}, cgroupValue{"memory.max", "8"}, false},
		"a first limit":         {&agentapi.ContainerStats{MemoryWorkingSet: 10}, cgroupValue{"memory.max", "8"}, true},
	} {
		if err := checkShrink(c.stats, []cgroupValue{c.value}); errdefs.IsFailedPrecondition(err) != c.refused || err != nil != c.refused {
			t.Errorf("%s: %v", name, err)
		}
	}
}
