package cri

import (
	"slices"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
)

// PodVMs has fn called with the VM of each sandbox that is ready: of those that
// are there, whoever made them, then of each that is made or whose VM has grown;
// from one goroutine, perhaps more than once for a VM, the latest word last. It
// is to be called once at most.
func (s *Server) PodVMs(fn func(vmpod.PodVM)) {
	s.background.Go(func() {
		for _, sb := range slices.Backward(s.store.allSandboxes()) { // the oldest first
			if sb.State == runtimeapi.PodSandboxState_SANDBOX_READY {
				fn(podVMOf(sb))
			}
		}
		s.podVMs.follow(s.ctx, func(id string) {
			if sb, ok := s.store.sandbox(id); ok && sb.State == runtimeapi.PodSandboxState_SANDBOX_READY {
				fn(podVMOf(sb))
			}
		})
	})
}

func podVMOf(sb *sandbox) vmpod.PodVM {
	m := sb.Config.GetMetadata()
	return vmpod.PodVM{
		ID: sb.VM, Owner: vmpod.Owner{PodUID: sb.VM.PodUID, Namespace: m.GetNamespace(), Name: m.GetName()},
		CPUs: sb.CPUs, Memory: sb.Memory, MAC: sb.Attachment.MAC,
	}
}
