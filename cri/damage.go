package cri

import (
	"fmt"
	"time"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
)

// Notices has fn called for all that users of pods should know, in order, from
// one goroutine. It is to be called once at most.
func (s *Server) Notices(fn func(vmpod.Notice)) {
	s.background.Go(func() {
		s.damages.follow(s.ctx, func(d storage.Damage) {
			for _, n := range s.noticesOf(d) {
				fn(n)
			}
		})
	})
}

// followDamage hears of damage from now on, where the store tells of it.
func (s *Server) followDamage() {
	if images, ok := s.config.Images.(storage.DamageTeller); ok {
		images.Damages(s.damages.tell)
	}
}

// noticesOf are for the pods whose VMs have what is damaged.
func (s *Server) noticesOf(d storage.Damage) (notices []vmpod.Notice) {
	for _, h := range d.Holds {
		vm, err := vmpod.ParseID(h.User)
		if err != nil {
			continue
		}
		sb, ok := s.store.sandboxOfVM(vm)
		if !ok {
			continue
		}
		m := sb.Config.GetMetadata()
		notices = append(notices, vmpod.Notice{PodUID: vm.PodUID, Namespace: m.GetNamespace(), Name: m.GetName(),
			Reason: vmpod.ReasonImageDamaged, Message: describeDamage(d, h.Image), At: time.Now()})
	}
	return notices
}

func describeDamage(d storage.Damage, image string) string {
	what, done := "Layer "+d.Layer+" of image "+image, "it was fetched again"
	switch {
	case d.Layer == "":
		what, done = "The metadata of image "+image, "it is made again"
	case !d.Mended:
		done = "it could not be fetched again without credentials, and the image will be pulled again for the next pod"
	}
	return fmt.Sprintf("%s is damaged on the node's disk: %s. This pod keeps the damaged file: make the pod anew if its files cannot be read", what, done)
}

// recheckImages has what the pod's VM reads looked at, as a disk of it fails.
func (p *pod) recheckImages() {
	if images, ok := p.s.config.Images.(storage.DamageTeller); ok {
		images.Recheck(p.vm.String())
	}
}
