package controlplane

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/openatoll/atoll/supervisor/namespaces"
)

// keepNamespaces is false where a test has a process of its own for it.
var keepNamespaces = true

// startNamespaces keeps namespaces in step with vSphere, from when there is a
// Supervisor. It is not waited for: a start does not need it.
func (s *supervisor) startNamespaces() error {
	if !keepNamespaces || s.config.NamespacesApart {
		return nil
	}
	cfg, err := restConfig(s.config, namespaceKeeper)
	if err != nil {
		return err
	}
	dir, err := filepath.Abs(s.config.DataDir)
	if err != nil {
		return err
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	controller, err := namespaces.New(namespaces.Options{
		Config: cfg,
		// One process at a time runs on a data directory, which its lock says.
		Identity: host + ":" + dir,
		Logger:   s.log,
	})
	if err != nil {
		return err
	}
	s.namespaces.Store(controller)
	s.start(s.clients, "namespaces", controller.Run)
	return nil
}

// checkNamespaces is healthy while vCenter does not answer, and says so: that is
// the Supervisor's condition, not this cluster's.
func (s *supervisor) checkNamespaces(ctx context.Context) (string, error) {
	if s.config.NamespacesApart {
		return "left to atoll-namespaces, a program of its own", nil
	}
	controller := s.namespaces.Load()
	if controller == nil {
		return "", errors.New("not started yet")
	}
	return controller.Health(ctx)
}
