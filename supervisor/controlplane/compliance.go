package controlplane

import "github.com/openatoll/atoll/supervisor/compliance"

// startCompliance has claims say whether their volumes are kept as their
// policies say. It needs the rights that the add-ons give.
func (s *supervisor) startCompliance() error {
	client, _, err := clients(s.config, complianceKeeper)
	if err != nil {
		return err
	}
	controller, err := compliance.New(client, nil)
	if err != nil {
		return err
	}
	s.start(s.clients, "compliance", controller.Run)
	return nil
}
