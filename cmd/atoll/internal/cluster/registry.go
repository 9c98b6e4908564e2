package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"

	"github.com/openatoll/atoll/supervisor/registry"
)

const (
	// registryName is what pods' images of the embedded registry are named
	// after: atoll.local/web.
	registryName = "atoll.local"
	// registryAddress is preferred; a host that uses the port gets another.
	registryAddress = "127.0.0.1:5000"
)

// serveRegistry serves the embedded registry until ctx ends, with the demo
// images if there are any, and writes where it is. The channel is closed once
// it has ended; an end of its own calls cancel.
func serveRegistry(ctx context.Context, l Layout, images string, cancel context.CancelCauseFunc) (<-chan struct{}, error) {
	ln, err := net.Listen("tcp4", registryAddress)
	if errors.Is(err, syscall.EADDRINUSE) {
		ln, err = net.Listen("tcp4", "127.0.0.1:0")
	}
	if err != nil {
		return nil, fmt.Errorf("embedded registry: %w", err)
	}
	if err := registry.WriteHosts(l.HostsDir(), registryName, "http://"+ln.Addr().String()); err != nil {
		ln.Close()
		return nil, err
	}
	cfg := registry.Config{Dir: l.RegistryDir(), Listener: ln}
	if images != "" {
		cfg.Seeds = []string{images}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := registry.Serve(ctx, cfg); err != nil {
			cancel(fmt.Errorf("embedded registry: %w", err))
		}
	}()
	return done, nil
}
