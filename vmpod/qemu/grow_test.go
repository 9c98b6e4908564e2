package qemu

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod"
)

func TestRoom(t *testing.T) {
	const mib, gib = 1 << 20, 1 << 30
	for name, c := range map[string]struct {
		cfg        Config
		cpus       int
		memory     int64
		wantCPUs   int
		wantMemory int64
	}{
		"a few CPUs in reserve":       {Config{GrowCPUs: 64, GrowMemory: 8 * gib}, 1, 300 * mib, 1 + reserveCPUs, 8 * gib},
		"as many again":               {Config{GrowCPUs: 64, GrowMemory: 8 * gib}, 8, 8 * gib, 16, 8 * gib},
		"no more than the host":       {Config{GrowCPUs: 2, GrowMemory: gib}, 1, 512 * mib, 2, gib},
		"launched larger":             {Config{GrowCPUs: 2, GrowMemory: gib}, 4, 2 * gib, 4, 2 * gib},
		"no more than can be":         {Config{GrowCPUs: 512, GrowMemory: 16 << 40}, 200, gib, maxCPUs, maxGrown},
		"whole steps beyond the RAM":  {Config{GrowCPUs: 1, GrowMemory: 310*mib + 5}, 1, 301 * mib, 1, 313 * mib},
		"RAM that is no whole number": {Config{GrowCPUs: 1, GrowMemory: 400 * mib}, 1, 300*mib + 1, 1, 401 * mib},
	} {
		cpus, memory := c.cfg.room(vmpod.Spec{CPUs: c.cpus, Memory: c.memory})
		if cpus != c.wantCPUs || memory != c.wantMemory {
			t.Errorf("%s: %d CPUs, %d MiB, want %d, %d", name, cpus, memory/mib, c.wantCPUs, c.wantMemory/mib)
		}
	}
}

// TestArgvOfNoGrowth: what cannot grow has no room on its command line, which
// QEMU would refuse.
func TestArgvOfNoGrowth(t *testing.T) {
	s := fullSpec()
	c := command{spec: s, maxCPUs: s.CPUs, maxMemory: memoryMiB(s) << 20, accel: AcceleratorKVM}
	args, err := c.argv(&fakeFDs{})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(args, "301M") || strings.Contains(strings.Join(args, " "), "maxmem") {
		t.Errorf("memory: %q", args)
	}
	if !slices.Contains(args, "2,sockets=1,cores=2,threads=1,maxcpus=2") {
		t.Errorf("CPUs: %q", args)
	}
}

func TestAdmitGrowth(t *testing.T) {
	have := vmpod.Extent{CPUs: 1, Memory: 256 << 20, MaxCPUs: 4, MaxMemory: 1 << 50}
	for name, c := range map[string]struct {
		cpus   int
		memory int64
		want   string // part of the refusal, or none
	}{
		"what is there":        {1, 256 << 20, ""},
		"CPUs to the last":     {4, 256 << 20, ""},
		"one CPU too many":     {5, 256 << 20, "4 at most"},
		"more than the most":   {1, 2 << 50, "at most"},
		"more than is left":    {1, 1 << 49, "the host has"},
		"a little more memory": {1, 257 << 20, ""},
	} {
		err := admit(have, c.cpus, c.memory)
		if c.want == "" && err == nil {
			continue
		}
		if c.want == "" || !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want ErrResourceExhausted with %q", name, err, c.want)
		}
	}
}

func TestHostMemory(t *testing.T) {
	total, available, err := hostMemory()
	if err != nil || available <= 0 || total < available {
		t.Errorf("host memory: %d, %d available, %v", total, available, err)
	}
}
