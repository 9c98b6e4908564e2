package controlplane

import (
	"log/slog"

	"github.com/openatoll/atoll/internal/vsphere"
	"github.com/openatoll/atoll/storage/vmdk"
	"github.com/openatoll/atoll/supervisor/volumes"
	"github.com/openatoll/atoll/vmpod"
)

// keepVolumes is false where a test has a process of its own for it.
var keepVolumes = true

// startVolumes serves claims of vCenter's storage policies, from when there is a
// Supervisor. It is not waited for: a start does not need it.
func (s *supervisor) startVolumes() error {
	if !keepVolumes {
		return nil
	}
	cfg, err := restConfig(s.config, volumeKeeper)
	if err != nil {
		return err
	}
	controller, err := volumes.New(volumes.Options{Config: cfg, Open: openVolumes(s.log), Logger: s.log})
	if err != nil {
		return err
	}
	s.start(s.clients, "volumes", controller.Run)
	return nil
}

// openVolumes is volumes.Options.Open.
func openVolumes(log *slog.Logger) func(vsphere.Config, string, func(id, name string) string) (volumes.Store, error) {
	return func(vcenter vsphere.Config, cluster string, policyName func(id, name string) string) (volumes.Store, error) {
		return vmdk.New(vmdk.Options{
			VCenter: vcenter, Cluster: cluster, PolicyName: policyName, Logger: log,
			Instance: func(vm string) (string, error) {
				id, err := vmpod.ParseID(vm)
				return id.UUID().String(), err
			},
		})
	}
}
