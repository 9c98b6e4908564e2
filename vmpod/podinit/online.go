package podinit

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// onlineTimeout is how long CPUs and memory that the host has plugged may take
// to be usable: emulation takes half a second for a CPU, and crowded hosts many
// times that.
const onlineTimeout = 30 * time.Second

// onlineSlack is what memory may miss, in bytes: less than a block of what the
// host plugs, and what modules took since the boot.
const onlineSlack = 8 << 20

// Online makes every CPU and memory block usable that is plugged and is not
// yet, waits until there is what the host says there should be, both being the
// machine's as the host counts them, and says what there is then. It may be
// repeated; less than what is there is there already.
func (a *agent) Online(ctx context.Context, r *agentapi.OnlineRequest) (*agentapi.OnlineResponse, error) {
	if err := a.requireSandbox(); err != nil {
		return nil, err
	}
	// The driver of the memory device stops for a while when much of what it
	// added lies idle, so blocks are used as they come. And they are used for
	// everything: a small machine that grows by much needs them for the kernel's
	// records of the memory itself. The kernel could give such blocks back only
	// by luck, but nobody will ask for them.
	_ = os.WriteFile("/sys/devices/system/memory/auto_online_blocks", []byte("online_kernel"), 0)
	var n *agentapi.OnlineResponse
	err := waitDevice(ctx, "what the host plugged", onlineTimeout, func() (bool, error) {
		onlineAll("/sys/devices/system/cpu/cpu[0-9]*/online", "0", "1")
		onlineAll("/sys/devices/system/memory/memory[0-9]*/state", "offline", "online_kernel")
		n = now()
		return n.Cpus >= r.Cpus && n.Memory+a.kept >= r.Memory-onlineSlack, nil
	})
	if err != nil {
		return nil, fmt.Errorf("the guest has %d of %d CPUs and %d of %d MiB: %w", n.Cpus, r.Cpus, (n.Memory+a.kept)>>20, r.Memory>>20, err)
	}
	return n, nil
}

func onlineAll(pattern, off, on string) {
	files, _ := filepath.Glob(pattern)
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == off {
			_ = os.WriteFile(f, []byte(on), 0) // what does not come online is not counted
		}
	}
}

func now() *agentapi.OnlineResponse {
	resp := &agentapi.OnlineResponse{Memory: int64(memInfo()["MemTotal"])}
	if b, err := os.ReadFile("/sys/devices/system/cpu/online"); err == nil {
		resp.Cpus = int32(countRanges(strings.TrimSpace(string(b))))
	}
	return resp
}

// keptMemory is what the kernel took of the RAM at the boot, in bytes, before
// it began to count: MemTotal is less than the machine's memory by so much.
func keptMemory(iomem string, total int64) int64 {
	var ram int64
	for line := range strings.Lines(iomem) {
		at, what, _ := strings.Cut(line, " : ")
		if strings.HasPrefix(line, " ") || strings.TrimSpace(what) != "System RAM" {
			continue
		}
		from, to, _ := strings.Cut(at, "-")
		a, err := strconv.ParseInt(from, 16, 64)
		b, err2 := strconv.ParseInt(to, 16, 64)
		if err == nil && err2 == nil {
			ram += b - a + 1
		}
	}
	return max(ram-total, 0)
}

// countRanges counts a list such as 0-3,5.
func countRanges(list string) int {
	n := 0
	for _, part := range strings.Split(list, ",") {
		from, to, ok := strings.Cut(part, "-")
		a, err := strconv.Atoi(from)
		if err != nil {
			continue
		}
		b := a
		if ok {
			if b, err = strconv.Atoi(to); err != nil {
				continue
			}
		}
		n += b - a + 1
	}
	return n
}
