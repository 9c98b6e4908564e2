package cri

import (
	"context"
	"time"

	bolt "go.etcd.io/bbolt"
)

// settleEvery is how often the disk is asked to take what it has refused.
const settleEvery = 2 * time.Second

// late notes that the disk refused a record that memory has; mu is held.
func (s *store) late(id string, err error) {
	if err == nil {
		s.caughtUp(id)
		return
	}
	s.behind[id] = true
	select {
	case s.refused <- struct{}{}:
	default:
	}
}

// caughtUp notes that the disk has the present state of a record, or that the
// record is gone; mu is held.
func (s *store) caughtUp(id string) {
	if !s.behind[id] {
		return
	}
	delete(s.behind, id)
	close(s.shrunk)
	s.shrunk = make(chan struct{})
}

// unrecorded counts the records that the disk lacks.
func (s *store) unrecorded() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.behind)
}

// awaitRecorded returns true once the disk has a record's present state, false
// when ctx ends first.
func (s *store) awaitRecorded(ctx context.Context, id string) bool {
	for {
		s.mu.RLock()
		behind, shrunk := s.behind[id], s.shrunk
		s.mu.RUnlock()
		if !behind {
			return true
		}
		select {
		case <-shrunk:
		case <-ctx.Done():
			return false
		}
	}
}

// settle writes what the disk has refused before.
func (s *store) settle() error {
	s.write.Lock()
	defer s.write.Unlock()
	s.mu.RLock()
	var sandboxes []*sandbox
	var containers []*container
	for id := range s.behind {
		if r, ok := s.sandboxes[id]; ok {
			sandboxes = append(sandboxes, r)
		}
		if r, ok := s.containers[id]; ok {
			containers = append(containers, r)
		}
	}
	s.mu.RUnlock()
	err := s.db.Update(func(tx *bolt.Tx) error {
		for _, r := range sandboxes {
			if err := put(tx, bucketSandboxes, r.ID, r); err != nil {
				return err
			}
		}
		for _, r := range containers {
			if err := put(tx, bucketContainers, r.ID, r.withoutSecrets()); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id := range s.behind {
		s.caughtUp(id)
	}
	return nil
}

// keepRecording writes refused records again until the disk takes them.
func (s *Server) keepRecording() {
	for {
		select {
		case <-s.store.refused:
		case <-s.ctx.Done():
			return
		}
		s.log.Error("the state file takes no changes; they are kept in memory until it does", "path", s.store.db.Path())
		for s.store.unrecorded() > 0 {
			select {
			case <-time.After(settleEvery):
			case <-s.ctx.Done():
				_ = s.store.settle()
				return
			}
			if err := s.store.settle(); err == nil {
				s.log.Info("the state file takes changes again")
			}
		}
	}
}
