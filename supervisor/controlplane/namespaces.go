package controlplane

import (
	"os"
	"path/filepath"

	"github.com/openatoll/atoll/supervisor/namespaces"
)

// startNamespaces keeps namespaces in step with vSphere, from when there is a
// Supervisor. It is not waited for: a start does not need it.
func (s *supervisor) startNamespaces() error {
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
	s.start(s.clients, "namespaces", controller.Run)
	return nil
}
