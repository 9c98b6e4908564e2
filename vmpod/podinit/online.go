package podinit

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// Online makes every CPU and memory block usable that is plugged and is not
// yet, and says what there is then.
func (a *agent) Online(ctx context.Context, r *agentapi.OnlineRequest) (*agentapi.OnlineResponse, error) {
	if err := a.requireSandbox(); err != nil {
		return nil, err
	}
	enough := func() (bool, error) {
		onlineAll("/sys/devices/system/cpu/cpu[0-9]*/online", "0", "1")
		onlineAll("/sys/devices/system/memory/memory[0-9]*/state", "offline", "online_movable")
		n := now()
		// Firmware and the kernel keep a part of the memory that was plugged.
		return n.Cpus >= r.Cpus && n.Memory >= r.Memory-r.Memory/16, nil
	}
	if err := waitDevice(ctx, "plugged CPUs and memory", deviceTimeout, enough); err != nil {
		return nil, err
	}
	return now(), nil
}

func onlineAll(pattern, off, on string) {
	files, _ := filepath.Glob(pattern)
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == off {
			_ = os.WriteFile(f, []byte(on), 0)
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
