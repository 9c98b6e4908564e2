package podinit

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"time"

	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
)

// portName is the virtio port on which the host is met.
const portName = "atoll.agent"

// Version is what Hello says; set by -ldflags -X.
var Version = "dev"

// Main is the whole program. It does not return in PID 1.
func Main() {
	if len(os.Args) > 0 && os.Args[0] == pauseName {
		pause()
	}
	if len(os.Args) > 0 && os.Args[0] == modprobeFile {
		os.Exit(modprobe("/modules", os.Args, loadModules))
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "podinit is PID 1 of Atoll's pod VMs; it does nothing elsewhere")
		os.Exit(2)
	}
	if err := run(); err != nil {
		slog.Error("the agent ended", "error", err)
		unix.Sync()
		os.Exit(1) // the kernel panics, and the host is told
	}
}

func run() error {
	began := uptime()
	if err := mountBase(); err != nil {
		return err
	}
	slog.SetDefault(kernelLogger())
	slog.Info("podinit started")
	quietKernel()
	relaxMonitor()
	// The heap is small and short-lived; memory belongs to the containers.
	debug.SetGCPercent(50)
	channel, rest := modulesIn("/modules")
	loadModules(channel)
	if err := leaveInitramfs(); err != nil {
		return err
	}
	if err := mountRest(); err != nil {
		return err
	}
	_ = os.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0o644)
	a := newAgent(layoutAt("/run/atoll"))
	if err := a.places.make(); err != nil {
		return err
	}
	var err error
	if a.crun, err = sealCrun(crunFile); err != nil {
		return fmt.Errorf("take crun: %w", err)
	}
	go a.reaper.loop()
	port, err := openPort(portName)
	if err != nil {
		return err
	}
	iomem, _ := os.ReadFile("/proc/iomem")
	a.kept = keptMemory(string(iomem), now().Memory)
	a.modules = loadBehind(rest)
	go offerModules(a.modules)
	slog.Info("agent ready", "version", Version, "init", time.Duration(began), "ready", time.Duration(uptime()))
	return agentapi.Serve(context.Background(), port, a, func(format string, args ...any) {
		slog.Warn("agent session", "detail", fmt.Sprintf(format, args...))
	})
}
