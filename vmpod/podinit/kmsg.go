package podinit

import (
	"bytes"
	"io"
	"log/slog"
	"os"
)

// kernelLogger logs to the kernel's ring, and so to the console that the
// driver keeps.
func kernelLogger() *slog.Logger {
	os.WriteFile("/proc/sys/kernel/printk_devkmsg", []byte("on"), 0o644)
	f, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		return slog.Default()
	}
	return slog.New(slog.NewTextHandler(kmsg{f}, &slog.HandlerOptions{
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{} // the ring has its own
			}
			return a
		},
	}))
}

// kmsg turns each line into one record of the ring.
type kmsg struct{ w io.Writer }

func (k kmsg) Write(p []byte) (int, error) {
	level := "<6>"
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
