package podinit

import (
	"bytes"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
)

// kernelLogger logs to the kernel's ring, and so to the console that the
// driver keeps.
func kernelLogger() *slog.Logger {
	_ = os.WriteFile("/proc/sys/kernel/printk_devkmsg", []byte("on"), 0o644)
	f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		return slog.Default()
	}
	return slog.New(slog.NewTextHandler(kmsg{w: f, info: infoLevel()}, &slog.HandlerOptions{
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{} // the ring has its own
			}
			return a
		},
	}))
}

// infoLevel is the kernel's level of what the agent says in passing. With
// "atoll.trace" on its command line even a quiet kernel shows it on the
// console, for people and benchmarks that watch a boot.
func infoLevel() string {
	cmdline, _ := os.ReadFile("/proc/cmdline")
	if slices.Contains(strings.Fields(string(cmdline)), "atoll.trace") {
		return "<1>"
	}
	return "<6>"
}

// kmsg turns each line into one record of the ring.
type kmsg struct {
	w    io.Writer
	info string
}

func (k kmsg) Write(p []byte) (int, error) {
	level := k.info
	switch {
	case bytes.HasPrefix(p, []byte("level=ERROR")):
		level = "<3>"
	case bytes.HasPrefix(p, []byte("level=WARN")):
		level = "<4>"
	}
	line := append([]byte(level+"atoll: "), p...)
	if len(line) > 900 { // the ring's limit is below 1 KiB
		line = append(line[:900], '\n')
	}
	_, err := k.w.Write(line)
	return len(p), err
}
