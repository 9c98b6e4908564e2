package qemu

import (
	"strings"
	"syscall"
	"testing"

	"github.com/openatoll/atoll/vmpod"
)

func TestClassify(t *testing.T) {
	exited := func(code int) *syscall.WaitStatus { s := syscall.WaitStatus(code << 8); return &s }
	signaled := func(sig syscall.Signal) *syscall.WaitStatus { s := syscall.WaitStatus(sig); return &s }
	for name, c := range map[string]struct {
		e      evidence
		want   vmpod.ExitReason
		detail string
	}{
		"poweroff":                  {evidence{shutdown: "guest-shutdown", watched: true}, vmpod.ExitGuestPoweroff, ""},
		"poweroff on request":       {evidence{shutdown: "guest-shutdown", stopAsked: true}, vmpod.ExitStopped, ""},
		"reset":                     {evidence{shutdown: "guest-reset", consoleTail: "a\n[1.0] reboot: Restarting system\n"}, vmpod.ExitGuestReset, "Restarting system"},
		"panic":                     {evidence{panicked: true, consoleTail: "[2.0] Kernel panic - not syncing: x\nmore"}, vmpod.ExitGuestPanic, "not syncing: x"},
		"panic without pvpanic":     {evidence{shutdown: "guest-reset", consoleTail: "Kernel panic - not syncing: y\n"}, vmpod.ExitGuestPanic, "not syncing: y"},
		"panic while stopping":      {evidence{panicked: true, stopAsked: true}, vmpod.ExitGuestPanic, ""},
		"found off":                 {evidence{foundOff: true, watched: true}, vmpod.ExitGuestPoweroff, "nobody watched"},
		"SIGTERM":                   {evidence{shutdown: "host-signal", status: exited(0), stderr: "qemu: terminating on signal 15 from pid 7"}, vmpod.ExitVMMKilled, "signal 15"},
		"told to quit by others":    {evidence{shutdown: "host-qmp-quit", status: exited(0)}, vmpod.ExitVMMKilled, "quit"},
		"told to quit by us":        {evidence{shutdown: "host-qmp-quit", status: exited(0), stopAsked: true}, vmpod.ExitStopped, ""},
		"SIGKILL":                   {evidence{status: signaled(syscall.SIGKILL), watched: true}, vmpod.ExitVMMKilled, "signal 9"},
		"SIGKILL by us":             {evidence{status: signaled(syscall.SIGKILL), stopAsked: true}, vmpod.ExitStopped, ""},
		"SIGABRT":                   {evidence{status: signaled(syscall.SIGABRT), stderr: "assertion failed"}, vmpod.ExitVMMKilled, "assertion failed"},
		"OOM":                       {evidence{status: signaled(syscall.SIGKILL), oomKills: 1}, vmpod.ExitVMMOOMKilled, ""},
		"OOM of an adopted one":     {evidence{oomKills: 1}, vmpod.ExitVMMOOMKilled, ""},
		"OOM of something else":     {evidence{oomKills: 1, shutdown: "guest-shutdown"}, vmpod.ExitGuestPoweroff, ""},
		"error exit":                {evidence{status: exited(1), stderr: "qemu: could not open x"}, vmpod.ExitVMMFailed, "could not open x"},
		"KVM gave up":               {evidence{internal: true, stderr: "KVM internal error"}, vmpod.ExitVMMFailed, "KVM internal error"},
		"exit 0 without a word":     {evidence{status: exited(0)}, vmpod.ExitUnknown, ""},
		"adopted, vanished":         {evidence{watched: true}, vmpod.ExitVMMKilled, "vanished"},
		"unseen":                    {evidence{}, vmpod.ExitUnknown, "gone"},
		"unseen, SIGTERM":           {evidence{stderr: "qemu: terminating on signal 15 from pid 7"}, vmpod.ExitVMMKilled, "signal 15"},
		"unseen, but asked to stop": {evidence{stopAsked: true}, vmpod.ExitStopped, ""},
		"host restart":              {evidence{hostRestarted: true, stopAsked: true}, vmpod.ExitHostRestart, ""},
	} {
		got := classify(c.e)
		if got.Reason != c.want || !strings.Contains(got.Message, c.detail) || got.Message == "" {
			t.Errorf("%s: %s: %q, want %s with %q", name, got.Reason, got.Message, c.want, c.detail)
		}
	}
}

func TestParseProbe(t *testing.T) {
	for _, c := range []struct {
		out    string
		err    error
		usable bool
		reason string
	}{
		{`{"usable":true}`, nil, true, ""},
		{`{"usable":false,"reason":"` + reasonSlow + `"}`, nil, false, reasonSlow},
		{`{"usable":false}`, nil, false, "RunProbeChild"},
		{"Usage: atoll ...", nil, false, "RunProbeChild"},
		{"", nil, false, "RunProbeChild"},
		{"", syscall.ENOENT, false, "no such file"},
	} {
		got := parseProbe([]byte(c.out), c.err)
		if got.Usable != c.usable || !strings.Contains(got.Reason, c.reason) || got.Usable == (got.Reason != "") {
			t.Errorf("parseProbe(%q, %v) = %+v", c.out, c.err, got)
		}
	}
}

// TestProbeKVM asks the real /dev/kvm, whatever it is worth here.
func TestProbeKVM(t *testing.T) {
	dir := t.TempDir()
	first := ProbeKVM(t.Context(), dir)
	t.Logf("KVM: %+v", first)
	if first.Usable == (first.Reason != "") {
		t.Errorf("usable without, or unusable with no reason: %+v", first)
	}
	if again := ProbeKVM(t.Context(), dir); again != first {
		t.Errorf("second answer %+v, the first %+v", again, first)
	}
}
