package qemu

import (
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/openatoll/atoll/vmpod"
)

// evidence is all that can be known about the end of a VM.
type evidence struct {
	pid           int
	at            time.Time
	stopAsked     bool   // Stop or Remove, this process's or an earlier one's
	watched       bool   // the monitor was connected
	shutdown      string // reason of the SHUTDOWN event (QAPI ShutdownCause)
	panicked      bool   // GUEST_PANICKED, or QEMU was found in that state
	internal      bool   // KVM gave up on the guest
	foundOff      bool   // found stopped by a shutdown that nobody saw
	hostRestarted bool
	oomKills      uint64              // of the VM's memory cgroup
	status        *syscall.WaitStatus // of our own child
	stderr        string              // QEMU's last line
	consoleTail   string              // the guest's last lines
}

// classify decides why a VM ended.
func classify(e evidence) vmpod.Exit {
	reason, message := e.decide()
	return vmpod.Exit{Reason: reason, Message: message, At: e.at}
}

func (e evidence) decide() (vmpod.ExitReason, string) {
	panicLine := lineWith(e.consoleTail, "Kernel panic")
	switch {
	case e.hostRestarted:
		return vmpod.ExitHostRestart, "the host has booted since the machine was launched"
	case e.panicked, e.shutdown == "guest-panic", panicLine != "" && isReset(e.shutdown):
		return vmpod.ExitGuestPanic, withConsole(withDetail("the guest's kernel panicked", panicLine), e.consoleTail)
	case e.killed() && e.oomKills > 0 && e.shutdown == "":
		return vmpod.ExitVMMOOMKilled, fmt.Sprintf("the host's OOM killer ended QEMU (pid %d): it needed more memory than the guest's RAM and its overhead", e.pid)
	case e.stopAsked:
		return vmpod.ExitStopped, "the machine was stopped on request"
	case e.internal:
		return vmpod.ExitVMMFailed, withDetail("the hypervisor could not go on executing the guest", e.stderr)
	case e.shutdown == "guest-shutdown":
		return vmpod.ExitGuestPoweroff, "the guest powered itself off"
	case isReset(e.shutdown):
		return vmpod.ExitGuestReset, withConsole(withDetail("the guest reset itself", lastOf(e.consoleTail)), e.consoleTail)
	case e.foundOff:
		return vmpod.ExitGuestPoweroff, "the guest ended while nobody watched"
	case e.shutdown == "host-signal":
		return vmpod.ExitVMMKilled, withDetail(fmt.Sprintf("a signal made QEMU (pid %d) quit", e.pid), e.stderr)
	case e.shutdown == "host-qmp-quit":
		return vmpod.ExitVMMKilled, fmt.Sprintf("somebody told QEMU (pid %d) to quit", e.pid)
	}
	return e.decideProcess()
}

// decideProcess judges a QEMU that went without a word on its monitor.
func (e evidence) decideProcess() (vmpod.ExitReason, string) {
	switch s := e.status; {
	case s != nil && s.Signaled():
		return vmpod.ExitVMMKilled, withDetail(fmt.Sprintf("QEMU (pid %d) was ended by signal %d (%s)", e.pid, s.Signal(), s.Signal()), e.stderr)
	case s != nil && s.ExitStatus() != 0:
		return vmpod.ExitVMMFailed, withDetail(fmt.Sprintf("QEMU (pid %d) exited with status %d", e.pid, s.ExitStatus()), e.stderr)
	case s != nil:
		return vmpod.ExitUnknown, withDetail(fmt.Sprintf("QEMU (pid %d) exited without saying why", e.pid), e.stderr)
	case strings.Contains(e.stderr, "terminating on signal"):
		return vmpod.ExitVMMKilled, withDetail(fmt.Sprintf("a signal made QEMU (pid %d) quit", e.pid), e.stderr)
	case e.watched:
		// Every orderly end is announced, so this one was not orderly. Its
		// status went to whoever inherited the process.
		return vmpod.ExitVMMKilled, withDetail(fmt.Sprintf("QEMU (pid %d) vanished", e.pid), e.stderr)
	}
	return vmpod.ExitUnknown, withDetail(fmt.Sprintf("QEMU (pid %d) was gone when it was looked for", e.pid), e.stderr)
}

// killed says that the process may have been ended by SIGKILL.
func (e evidence) killed() bool {
	return e.status == nil || e.status.Signaled() && e.status.Signal() == syscall.SIGKILL
}

func isReset(shutdown string) bool {
	return shutdown == "guest-reset" || shutdown == "subsystem-reset"
}

func withDetail(message, detail string) string {
	if detail == "" {
		return message
	}
	return message + ": " + detail
}

// maxConsoleTail is how much of the console a message carries, in bytes: it
// ends in a container's status, of which Kubernetes keeps 4096.
const maxConsoleTail = 2048

// withConsole adds the console's last whole lines.
func withConsole(message, console string) string {
	console = strings.TrimSpace(console)
	if len(console) > maxConsoleTail {
		console = console[len(console)-maxConsoleTail:]
		if _, whole, ok := strings.Cut(console, "\n"); ok {
			console = whole
		}
	}
	if console = strings.TrimSpace(strings.ToValidUTF8(console, "")); console == "" {
		return message
	}
	return message + "\nThe console's end:\n" + console
}

// lineWith returns the last line of text that holds s, without the kernel's
// time stamp; lastOf simply the last one.
func lineWith(text, s string) string {
	i := strings.LastIndex(text, s)
	if i < 0 {
		return ""
	}
	line, _, _ := strings.Cut(text[i:], "\n")
	return strings.TrimSpace(line)
}

func lastOf(text string) string {
	text = strings.TrimSpace(text)
	return strings.TrimSpace(text[strings.LastIndexByte(text, '\n')+1:])
}
