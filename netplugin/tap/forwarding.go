package tap

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

const forwardSysctl = "/proc/sys/net/ipv4/ip_forward"

// forwardingFile says that it was us who turned forwarding on, and what was
// there before.
func forwardingFile(stateDir string) string { return filepath.Join(stateDir, "ip_forward.before") }

// enableForwarding turns on the kernel's IPv4 forwarding, in this network
// namespace, and records what to put back before it does.
func (n *Network) enableForwarding() error {
	b, err := os.ReadFile(forwardSysctl)
	if err != nil {
		return fmt.Errorf("sysctl net.ipv4.ip_forward: %w", err)
	}
	before := strings.TrimSpace(string(b))
	if before == "1" {
		return nil
	}
	if err := os.WriteFile(forwardingFile(n.cfg.StateDir), []byte(before+"\n"), 0o600); err != nil {
		return fmt.Errorf("pod network: %w", err)
	}
	if err := os.WriteFile(forwardSysctl, []byte("1"), 0); err != nil {
		return fmt.Errorf("sysctl net.ipv4.ip_forward=1: %w", err)
	}
	n.log.Info("pod network: IPv4 forwarding turned on", "before", before)
	return nil
}

// forwardingIsOn is for Ready. Off is fine as long as nothing is attached: the
// first Attach turns it on.
func forwardingIsOn() error {
	f, err := os.OpenFile(forwardSysctl, os.O_WRONLY, 0)
	if err != nil {
		b, rerr := os.ReadFile(forwardSysctl)
		if rerr == nil && strings.TrimSpace(string(b)) == "1" {
			return nil
		}
		return fmt.Errorf("pod network: IPv4 forwarding is off and cannot be turned on (%v): run `sysctl -w net.ipv4.ip_forward=1`: %w", err, errdefs.ErrFailedPrecondition)
	}
	return f.Close()
}

// restoreForwarding undoes enableForwarding, if it was us.
func restoreForwarding(stateDir string) error {
	file := forwardingFile(stateDir)
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pod network: %w", err)
	}
	if err := os.WriteFile(forwardSysctl, []byte(strings.TrimSpace(string(b))), 0); err != nil {
		return fmt.Errorf("sysctl net.ipv4.ip_forward: %w", err)
	}
	if err := os.Remove(file); err != nil {
		return fmt.Errorf("pod network: %w", err)
	}
	return nil
}
