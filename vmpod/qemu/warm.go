package qemu

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/vmpod"
)

// fillPool makes one warm clone of the first of Config.Templates.Sizes, if the
// pool and the budget have room, and says whether it may be called again at
// once.
func (s *templateStore) fillPool(from *nowhere) bool {
	sizes := s.d.cfg.Templates.Sizes
	if s.d.cfg.Templates.Warm == 0 || len(sizes) == 0 || s.d.life.Err() != nil {
		return false
	}
	s.mu.Lock()
	var t *template
	for _, e := range s.entries {
		if e.pinned && e.state == templateReady && !e.shape.furnished && e.shape.cpus == sizes[0].CPUs && e.shape.memory == sizes[0].template() {
			t = e.t
		}
	}
	if t == nil || len(s.warm) >= s.d.cfg.Templates.Warm || time.Now().Before(s.warmNext) || s.cost()+warmCost > s.d.cfg.Templates.Memory {
		s.mu.Unlock()
		return false
	}
	t.users++
	s.mu.Unlock()
	defer s.release(t)
	w, err := s.d.startScratch(s.d.life, scratchWarm, s.d.templateCommand(t.shape, t.ram, true), from, false)
	if err == nil {
		w.template = t
		if err = restore(s.d.life, w.q, t); err != nil {
			w.end()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err != nil:
		s.warmNext = time.Now().Add(templateBackoff)
		if s.d.life.Err() == nil {
			s.log.Warn("no clone can be kept warm for now", "err", err)
		}
		return false
	case t.dropped || s.d.life.Err() != nil:
		s.ending.Go(w.end)
		return true
	}
	s.warm = append(s.warm, w)
	s.log.Info("clone waits for a pod", "cpus", t.shape.cpus, "memory", t.shape.memory, "waiting", len(s.warm))
	failpoint.Hit(failpoint.WarmWaiting)
	return true
}

// warmCost is what a clone that has not run costs the host, in bytes: PSS of
// one of ten, see the decision record.
const warmCost = 16 << 20

// cost is what templates and warm clones cost the host. The caller has mu.
func (s *templateStore) cost() int64 {
	total := int64(len(s.warm)) * warmCost
	for _, e := range s.entries {
		if e.t != nil {
			total += used(e.t.ram)
		}
	}
	return total
}

// warmEntry is a template of which a clone waits that is as large as the VM is
// to be; nil if there is none. The caller has mu.
func (s *templateStore) warmEntry(want shape) *templateEntry {
	want.furnished = false
	for _, w := range s.warm {
		if e := s.entries[want]; e != nil && e.t == w.template {
			return e
		}
	}
	return nil
}

// takeWarm returns a clone of t that waits for a pod; nil if there is none.
func (s *templateStore) takeWarm(t *template) *scratch {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, w := range s.warm {
		if w.template != t {
			continue
		}
		s.warm = slices.Delete(s.warm, i, i+1)
		s.kick()
		select {
		case <-w.child.ended: // somebody has killed it
			s.ending.Go(w.end)
			return nil
		default:
			return w
		}
	}
	return nil
}

// claimWarm makes a waiting clone a pod's VM: its sockets get the pod's names.
// It keeps the user that it runs as.
func (d *Driver) claimWarm(w *scratch, spec vmpod.Spec, dir vmDir) (*Machine, error) {
	w.q.close()
	w.pidfd.Close()
	paths := d.socketPaths(spec.ID)
	for name, old := range w.sockets {
		if err := os.Rename(old, paths[name]); err != nil && !errors.Is(err, fs.ErrNotExist) { // not all are there yet
			w.q, w.pidfd = nil, nil
			w.end()
			return nil, err
		}
	}
	failpoint.Hit(failpoint.CloneClaimed)
	_ = os.Rename(w.stderr, dir.file(stderrFile))
	d.mu.Lock()
	d.users.release(w.id)
	d.users.hold(spec.ID, w.proc.UID)
	d.mu.Unlock()
	w.proc.Cgroups = nil
	return d.superviseClone(spec, dir, w.template, w.proc, w.child)
}
