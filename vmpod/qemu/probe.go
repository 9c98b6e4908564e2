package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// KVMStatus says whether KVM can run pod VMs on this host.
type KVMStatus struct {
	Usable bool `json:"usable"`
	// Reason says why not, in a few words; empty if usable.
	Reason string `json:"reason,omitempty"`
}

const (
	// probeEnv marks the child that runs the probe. An environment variable
	// rather than an argument, so that a caller that forgot RunProbeChild is
	// found out (see ProbeKVM) instead of started again and again.
	probeEnv = "ATOLL_QEMU_KVM_PROBE"
	// probeFile is the cache; a result holds for one boot of the host.
	probeFile = "kvm-probe.json"
	// probeLoops take a CPU less than a millisecond, an emulator of ring 0 as
	// KVM on a host without VMX more than probeTime.
	probeLoops = 1_000_000
	probeTime  = 300 * time.Millisecond
	// probePatience bounds the child, whose ioctls may hang.
	probePatience = 5 * time.Second
)

const (
	reasonSlow = "executes guest code too slowly (emulated)"
	reasonHung = "does not return from running a guest"
)

// RunProbeChild runs the probe and exits if this process was started by
// ProbeKVM to do that, and returns otherwise. Programs that use this package
// call it first thing in main, test binaries in TestMain.
func RunProbeChild() {
	if os.Getenv(probeEnv) == "" {
		return
	}
	b, err := json.Marshal(probeKVM(probeTime))
	if err != nil {
		os.Exit(1)
	}
	if _, err := os.Stdout.Write(b); err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

// cachedProbe is the content of probeFile.
type cachedProbe struct {
	BootID string `json:"bootID"`
	KVMStatus
}

// ProbeKVM finds out whether KVM executes guest code, and not only pretends
// to: it counts how far a virtual CPU gets in 300 ms. That happens in a child,
// killed if it hangs, and once a host boot: the answer is kept in cacheDir.
func ProbeKVM(ctx context.Context, cacheDir string) KVMStatus {
	if _, err := os.Stat("/dev/kvm"); errors.Is(err, os.ErrNotExist) {
		return KVMStatus{Reason: "there is no /dev/kvm"}
	}
	boot, err := bootID()
	if err != nil {
		return KVMStatus{Reason: err.Error()}
	}
	path := filepath.Join(cacheDir, probeFile)
	var c cachedProbe
	if b, err := os.ReadFile(path); err == nil && json.Unmarshal(b, &c) == nil && c.BootID == boot {
		return c.KVMStatus
	}
	c = cachedProbe{boot, runProbe(ctx)}
	if ctx.Err() == nil {
		// Without the cache the next start probes again, no more.
		if b, err := json.Marshal(c); err == nil && os.WriteFile(path+".new", b, 0o600) == nil {
			_ = os.Rename(path+".new", path)
		}
	}
	return c.KVMStatus
}

func runProbe(ctx context.Context) KVMStatus {
	if os.Getenv(probeEnv) != "" {
		return KVMStatus{Reason: "the program does not call qemu.RunProbeChild first in its main"}
	}
	ctx, cancel := context.WithTimeout(ctx, probePatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = []string{"atoll-kvm-probe"}
	cmd.Env = append(os.Environ(), probeEnv+"=1")
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return KVMStatus{Reason: reasonHung}
	}
	return parseProbe(out, err)
}

// parseProbe judges what the child left.
func parseProbe(out []byte, err error) KVMStatus {
	var s KVMStatus
	if err != nil {
		return KVMStatus{Reason: fmt.Sprintf("the probe failed: %v", err)}
	}
	if jerr := json.Unmarshal(out, &s); jerr != nil || (!s.Usable && s.Reason == "") {
		return KVMStatus{Reason: fmt.Sprintf("the probe answered %q: does main call qemu.RunProbeChild first?", strings.TrimSpace(string(out[:min(len(out), 100)])))}
	}
	return s
}
