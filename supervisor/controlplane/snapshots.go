package controlplane

import "github.com/openatoll/atoll/supervisor/snapshots"

// startSnapshots starts the snapshot controller. It is not waited for: a start
// does not need it.
func (s *supervisor) startSnapshots() error {
	cfg, err := restConfig(s.config, snapshotKeeper)
	if err != nil {
		return err
	}
	controller, err := snapshots.New(snapshots.Options{Config: cfg, Logger: s.log})
	if err != nil {
		return err
	}
	s.start(s.clients, "snapshots", controller.Run)
	return nil
}
