package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/cmd/atoll/internal/hostnet"
	"github.com/openatoll/atoll/netplugin/tap"
)

// NodeLink carries the node's address.
const NodeLink = "atoll0"

// ensureLink makes the node link in the cluster's network namespace. It also
// carries the Services' range: the node itself must have a way to send to
// them, for nftables to redirect it, and not by a route that leads outside.
func (l Layout) ensureLink(ctx context.Context, s State, addr netip.Addr, services netip.Prefix) error {
	if !s.Isolated {
		if err := l.claimHost(); err != nil {
			return err
		}
	}
	// A wider prefix would route its whole range into the link.
	return hostnet.Do(s.Netns(l), func() error {
		return tap.EnsureNodeLink(ctx, NodeLink, []netip.Prefix{netip.PrefixFrom(addr, addr.BitLen())}, services)
	})
}

// removeLink removes the host's node link if it is this cluster's; that of an
// isolated cluster goes with its network namespace.
func (l Layout) removeLink(ctx context.Context) (removed bool, err error) {
	owner, err := os.ReadFile(l.claimFile())
	if errors.Is(err, fs.ErrNotExist) || err == nil && string(owner) != l.ID() {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("host's network: %w", err)
	}
	if err := tap.RemoveNodeLink(ctx, NodeLink); err != nil {
		return false, err
	}
	return true, os.Remove(l.claimFile())
}

// claimFile names the one cluster that uses the host's network.
func (l Layout) claimFile() string { return filepath.Join(filepath.Dir(l.RunDir()), "host-network") }

func (l Layout) claimHost() error {
	owner, err := os.ReadFile(l.claimFile())
	if err == nil && string(owner) != l.ID() {
		return fmt.Errorf("another cluster (run directory %s) uses the host's network; take it down, or use --isolated: %w",
			filepath.Join(filepath.Dir(l.RunDir()), string(owner)), errdefs.ErrAlreadyExists)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("host's network: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(l.claimFile()), 0o755); err != nil {
		return fmt.Errorf("host's network: %w", err)
	}
	return os.WriteFile(l.claimFile(), []byte(l.ID()), 0o644)
}
