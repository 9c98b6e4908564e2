package podinit

import (
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// emulatedParam on the kernel's command line says that no hardware runs this
// machine's code.
const emulatedParam = "atoll.emulated"

const (
	// emulatedSlack is how much later than asked the Go runtime's monitor may
	// wake up in an emulated machine.
	emulatedSlack = time.Millisecond
	// defaultSlack is what Linux gives to processes (see prctl(2),
	// PR_SET_TIMERSLACK), and so what containers get.
	defaultSlack = 50 * time.Microsecond
)

// relaxMonitor lets the Go runtime's monitor thread sleep longer. While any
// goroutine runs it wakes up every 20 µs at first (sysmon in runtime/proc.go),
// which is next to nothing on hardware. Where a timer, an interrupt and two
// switches of threads are emulated, it is most of what a short answer to the
// host costs: an idle pod's guest took 306 such wake-ups in 20 s.
func relaxMonitor() {
	cmdline, _ := os.ReadFile("/proc/cmdline")
	if !slices.Contains(strings.Fields(string(cmdline)), emulatedParam) {
		return
	}
	tid, ok := monitorThread("/proc/self/task")
	if !ok {
		return
	}
	err := os.WriteFile("/proc/"+strconv.Itoa(tid)+"/timerslack_ns", strconv.AppendInt(nil, int64(emulatedSlack), 10), 0o644)
	if err != nil {
		slog.Warn("the runtime's monitor keeps waking up often", "error", err)
	}
}

// monitorThread is the first thread that the runtime made; ok is false if there
// is none yet.
func monitorThread(dir string) (tid int, ok bool) {
	entries, _ := os.ReadDir(dir)
	var tids []int
	for _, e := range entries {
		if n, err := strconv.Atoi(e.Name()); err == nil {
			tids = append(tids, n)
		}
	}
	if slices.Sort(tids); len(tids) < 2 {
		return 0, false
	}
	return tids[1], true
}

// withDefaultSlack calls f, which forks, on a thread whose slack children may
// inherit: those that the monitor made have its own.
func withDefaultSlack(f func()) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(defaultSlack), 0, 0, 0)
	f()
}
