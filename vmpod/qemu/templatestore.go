package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
)

// How far a template's memory may be from a VM's: beyond, what the kernel
// sized by its memory at boot would be too small for the VM.
const maxGrowFactor = 4

// maxTemplateMemory bounds the RAM of a template, in bytes. Larger VMs are
// grown from one: a page of a template that the first clone touches is kept
// twice, once for all of its clones.
const maxTemplateMemory = 1 << 30

// A templateStore has a driver's templates and decides which are made.
type templateStore struct {
	d   *Driver
	log *slog.Logger
	off string // why there are none; empty if there are

	wake    chan struct{}
	started bool
	// recovered is closed when it is known what is left of an earlier process.
	recovered chan struct{}
	done      chan struct{} // closed when the worker has ended

	mu       sync.Mutex
	gen      generation
	entries  map[shape]*templateEntry
	warm     []*scratch     // each of a template of an entry
	ending   sync.WaitGroup // warm clones that are no longer wanted
	warmNext time.Time      // after a failure
	launches map[launchKind]uint64
}

// A templateEntry is a template that is there, or is to be.
type templateEntry struct {
	shape    shape
	state    templateState
	t        *template
	pinned   bool  // one of Config.Templates.Sizes
	order    int   // of the pinned
	bytes    int64 // of a pinned one that was dropped for want of room
	demand   int   // launches that would have used it
	uses     uint64
	lastUsed time.Time
	attempts int
	next     time.Time // of an attempt
	err      error     // of the last one
	changed  chan struct{}
}

// A templateState is where a template is in its life.
type templateState string

// States of a template.
const (
	templateIdle   templateState = "Idle" // nobody has wanted it enough
	templateWanted templateState = "Wanted"
	templateMaking templateState = "Making"
	templateReady  templateState = "Ready"
	templateFailed templateState = "Failed" // given up
)

func newTemplateStore(d *Driver) *templateStore {
	s := &templateStore{d: d, log: d.log, wake: make(chan struct{}, 1), done: make(chan struct{}), recovered: make(chan struct{}),
		entries: map[shape]*templateEntry{}, launches: map[launchKind]uint64{}}
	switch {
	case !d.cfg.Templates.Enabled:
		s.off = coldDisabled
	case d.sharesMemory():
		s.off = coldShares
	}
	return s
}

// start sweeps what an earlier process left and begins to make templates.
func (s *templateStore) start() error {
	if s.off != "" {
		return os.RemoveAll(s.d.templateDir())
	}
	var err error
	if s.gen, err = s.d.generation(); err != nil {
		return err
	}
	s.pin()
	s.started = true
	go s.run()
	return nil
}

// stop waits for the worker, which the driver's end has ended with what it was
// making, and drops what nobody could find again.
func (s *templateStore) stop() {
	if !s.started {
		return
	}
	<-s.done
	s.mu.Lock()
	warm, entries := s.warm, s.entries
	s.warm, s.entries = nil, map[shape]*templateEntry{}
	s.mu.Unlock()
	for _, w := range warm {
		w.end()
	}
	s.ending.Wait()
	living := s.d.clonesByTemplate()
	for _, e := range entries {
		switch {
		case e.t == nil:
		case len(living[e.t.name]) == 0: // nothing is left by which to find it again
			s.d.dropTemplate(e.t)
		default:
			e.t.ram.Close()
		}
	}
}

// pin wants those templates that the configuration names. The caller has mu,
// or is alone.
func (s *templateStore) pin() {
	if s.d.cfg.Templates.PerTenant {
		return
	}
	for i, size := range s.d.cfg.Templates.Sizes {
		sh := shape{cpus: size.CPUs, memory: size.template(), furnished: s.d.furnishes()}
		s.pinOne(sh, i)
		if sh.furnished && i == 0 && s.d.cfg.Templates.Warm > 0 {
			sh.furnished = false // one that waits cannot know whose disk it will have
			s.pinOne(sh, len(s.d.cfg.Templates.Sizes))
		}
	}
}

// template is the RAM of the template that is made for a size, in bytes.
func (s Size) template() int64 {
	return min(memoryMiB(vmpod.Spec{Memory: s.Memory})<<20, maxTemplateMemory)
}

func (s *templateStore) pinOne(sh shape, order int) {
	e := s.entry(sh)
	e.pinned, e.state = true, templateWanted
	e.order = order
}

func (s *templateStore) entry(sh shape) *templateEntry {
	e := s.entries[sh]
	if e == nil {
		e = &templateEntry{shape: sh, state: templateIdle, changed: make(chan struct{})}
		s.entries[sh] = e
	}
	return e
}

// set moves an entry on. The caller has mu.
func (e *templateEntry) set(state templateState) {
	e.state = state
	close(e.changed)
	e.changed = make(chan struct{})
}

// again wants a template anew after an attempt that failed, and returns how long
// that is put off. The caller has mu.
func (e *templateEntry) again() time.Duration {
	wait := templateBackoff
	for n := 1; n < e.attempts && wait < templateMaxBackoff; n++ {
		wait *= 2
	}
	wait = min(wait, templateMaxBackoff)
	e.next = time.Now().Add(wait)
	e.set(templateWanted)
	return wait
}

// renew forgets templates of another generation. The caller has mu.
func (s *templateStore) renew() error {
	gen, err := s.d.generation()
	if err != nil || gen == s.gen {
		return err
	}
	s.log.Info("the guest or QEMU has changed: templates are made anew")
	s.gen = gen
	for sh, e := range s.entries {
		if e.t != nil {
			s.discard(e.t)
		}
		delete(s.entries, sh)
		close(e.changed)
	}
	s.pin()
	s.kick()
	return errChanged
}

// look has templates made anew if what they are made of has changed.
func (s *templateStore) look() {
	if s == nil || !s.started {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.renew(); err != nil && !errors.Is(err, errChanged) {
		s.log.Warn("templates cannot be compared with the guest", "err", err)
	}
}

var errChanged = errors.New("the guest or QEMU has changed")

// kick has the worker look again.
func (s *templateStore) kick() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// discard drops a template as soon as no launch uses it, and ends those of its
// clones that wait for a pod. The caller has mu.
func (s *templateStore) discard(t *template) {
	t.dropped = true
	s.warm = slices.DeleteFunc(s.warm, func(w *scratch) bool {
		if w.template != t {
			return false
		}
		s.ending.Go(w.end)
		return true
	})
	if t.users == 0 {
		s.d.dropTemplate(t)
	}
}

// release gives back what choose returned.
func (s *templateStore) release(t *template) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t.users--; t.users == 0 && t.dropped {
		s.d.dropTemplate(t)
	}
}

// choose returns the template for a VM, to be released, or why there is none.
// Wanting one may have it made, for the next.
func (s *templateStore) choose(spec vmpod.Spec) (*template, string) {
	if s.off != "" {
		return nil, s.off
	}
	want := s.d.shapeOf(spec)
	if !want.furnished && len(spec.Disks)+len(spec.NICs) > plugSlots {
		return nil, coldDevices
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.renew(); err != nil {
		return nil, coldChanged
	}
	exact := want
	exact.memory = min(want.memory, maxTemplateMemory)
	if want.memory > maxGrowFactor*exact.memory {
		return nil, coldSize
	}
	e := s.entry(exact)
	e.demand++
	best := s.nearest(want)
	if e := s.warmEntry(want); e != nil && len(spec.Disks)+len(spec.NICs) <= plugSlots {
		best = e
	}
	if e.state == templateIdle && (e.demand > 1 || best == nil && !s.coming(want)) {
		e.set(templateWanted)
		s.kick()
	}
	if best == nil {
		return nil, coldMissing
	}
	best.uses++
	best.lastUsed = time.Now()
	best.t.users++
	return best.t, ""
}

// nearest is the largest template that a VM can be grown from, or is of its
// size. The caller has mu.
func (s *templateStore) nearest(want shape) *templateEntry {
	var best *templateEntry
	for sh, e := range s.entries {
		if e.state != templateReady || !sh.fits(want) ||
			best != nil && sh.memory < best.shape.memory {
			continue
		}
		if _, room := s.d.cfg.room(sh.spec(vmpod.ID{})); want.memory > room {
			continue
		}
		best = e
	}
	return best
}

// fits says whether a VM can be cloned from a template of shape s, but for the
// room that it has.
func (s shape) fits(want shape) bool {
	return s.cpus == want.cpus && s.tenant == want.tenant && s.furnished == want.furnished &&
		s.memory <= want.memory && want.memory <= maxGrowFactor*s.memory
}

// coming says whether a template that would do is being made, or is going to
// be. The caller has mu.
func (s *templateStore) coming(want shape) bool {
	for sh, e := range s.entries {
		if (e.state == templateWanted || e.state == templateMaking) && sh.fits(want) {
			return true
		}
	}
	return false
}

// restartQuiet is how long a driver that finds machines of an earlier one makes
// no templates: the runtime has all of their agents to reach again within 5 s,
// and a template's boot takes most of a core, whatever its priority.
const restartQuiet = 10 * time.Second

// hasMachines says whether an earlier driver has left any.
func (d *Driver) hasMachines() bool {
	entries, _ := os.ReadDir(d.cfg.StateDir)
	return slices.ContainsFunc(entries, func(e os.DirEntry) bool { return !strings.HasPrefix(e.Name(), ".") })
}

// run is the worker: it makes one template at a time.
func (s *templateStore) run() {
	defer close(s.done)
	from := newNowhere()
	defer from.close()
	_ = from.do(func() error { return unix.Setpriority(unix.PRIO_PROCESS, 0, templateNice) })
	if err := s.recover(); err != nil {
		s.log.Warn("templates of an earlier process are not used", "err", err)
	}
	close(s.recovered)
	if s.d.hasMachines() {
		select {
		case <-time.After(restartQuiet):
		case <-s.d.life.Done():
		}
	}
	for s.d.life.Err() == nil {
		e, pause := s.nextWanted()
		if e != nil {
			s.make(from, e)
			continue
		}
		if s.fillPool(from) {
			continue
		}
		timer := time.NewTimer(pause)
		select {
		case <-s.wake:
		case <-timer.C:
		case <-s.d.life.Done():
		}
		timer.Stop()
	}
}

// nextWanted is what to make now, or how long nothing is.
func (s *templateStore) nextWanted() (*templateEntry, time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now, pause := time.Now(), templateMaxBackoff
	var wanted []*templateEntry
	s.wantBack()
	for _, e := range s.entries {
		if e.state != templateWanted {
			continue
		}
		if wait := e.next.Sub(now); wait > 0 {
			pause = min(pause, wait)
			continue
		}
		wanted = append(wanted, e)
	}
	if len(wanted) == 0 {
		return nil, pause
	}
	slices.SortFunc(wanted, func(a, b *templateEntry) int {
		if a.pinned != b.pinned {
			if a.pinned {
				return -1
			}
			return 1
		}
		if a.pinned {
			return a.order - b.order
		}
		return b.demand - a.demand
	})
	wanted[0].set(templateMaking)
	return wanted[0], 0
}

func (s *templateStore) make(from *nowhere, e *templateEntry) {
	s.mu.Lock()
	gen := s.gen
	s.mu.Unlock()
	begin := time.Now()
	log := s.log.With("cpus", e.shape.cpus, "memory", e.shape.memory)
	if e.shape.tenant != "" {
		log = log.With("namespace", e.shape.tenant)
	}
	name, err := s.d.templateKey(e.shape)
	var t *template
	if err == nil {
		t, err = s.d.makeTemplate(s.d.life, from, e.shape, name)
	}
	if now, gerr := s.d.generation(); err == nil && (gerr != nil || now != gen) {
		s.d.dropTemplate(t)
		err = errChanged
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.entries[e.shape] != e { // forgotten meanwhile
		if err == nil {
			s.d.dropTemplate(t)
		}
		return
	}
	if e.err = err; err != nil {
		e.attempts++
	}
	switch {
	case err == nil:
		e.t, e.lastUsed = t, time.Now()
		e.set(templateReady)
		log.Info("template is ready", "template", name, "took", time.Since(begin), "bytes", t.bytes)
		s.evict(e)
	case s.d.life.Err() != nil:
		e.set(templateIdle)
	case e.attempts >= templateAttempts && !errors.Is(err, context.DeadlineExceeded): // which a host may be that pods keep busy
		e.set(templateFailed)
		log.Error("no template can be made: pod VMs of this size boot", "attempts", e.attempts, "err", err)
	default:
		wait := e.again()
		log.Warn("template could not be made: pod VMs boot until one is", "attempt", e.attempts, "again_in", wait, "err", err)
	}
}

// evict keeps what templates cost within the budget, those that were used last
// before others. kept is one that stays. The caller has mu.
func (s *templateStore) evict(kept *templateEntry) {
	for {
		total := s.cost()
		var oldest *templateEntry
		for _, e := range s.entries {
			if e.state != templateReady {
				continue
			}
			if e != kept && (oldest == nil || oldest.pinned && !e.pinned || oldest.pinned == e.pinned && e.lastUsed.Before(oldest.lastUsed)) {
				oldest = e
			}
		}
		if total <= s.d.cfg.Templates.Memory || oldest == nil {
			return
		}
		s.log.Info("template is dropped: others are used more", "cpus", oldest.shape.cpus, "memory", oldest.shape.memory, "template", oldest.t.name)
		if oldest.pinned { // until there is room again
			oldest.bytes, oldest.demand = used(oldest.t.ram), 0
			s.discard(oldest.t)
			oldest.t = nil
			oldest.set(templateIdle)
			continue
		}
		s.discard(oldest.t)
		delete(s.entries, oldest.shape)
		close(oldest.changed)
	}
}

// wantBack wants a pinned template again that had to go, once there is room. The
// caller has mu.
func (s *templateStore) wantBack() {
	for _, e := range s.entries {
		if e.pinned && e.state == templateIdle && s.cost()+e.bytes <= s.d.cfg.Templates.Memory {
			e.set(templateWanted)
			return // the next one when it is known what this one costs
		}
	}
}

// failed tells that a clone of t could not be made; t is not used again.
func (s *templateStore) failed(t *template, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[t.shape]
	if e == nil || e.t != t {
		return
	}
	s.log.Warn("template is thrown away", "template", t.name, "cpus", t.shape.cpus, "memory", t.shape.memory, "err", why)
	s.discard(t)
	e.t, e.err = nil, why
	if e.attempts++; e.attempts >= templateAttempts {
		e.set(templateFailed)
		s.log.Error("no template is of use: pod VMs of this size boot", "cpus", t.shape.cpus, "memory", t.shape.memory, "attempts", e.attempts)
		return
	}
	e.again()
	s.kick()
}

// worked tells that a clone of t was made, so that failures begin to count anew.
func (s *templateStore) worked(t *template) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.entries[t.shape]; e != nil && e.t == t {
		e.attempts = 0
	}
}

// AwaitTemplate has the template made from which VMs of the Spec's size and
// owner are cloned as they are, and waits until it is there or could not be
// made. ErrFailedPrecondition if this driver makes none.
func (d *Driver) AwaitTemplate(ctx context.Context, spec vmpod.Spec) error {
	s := d.templates
	if s.off != "" {
		return fmt.Errorf("templates: %s: %w", s.off, errdefs.ErrFailedPrecondition)
	}
	want := d.shapeOf(spec)
	if want.memory > maxTemplateMemory {
		return fmt.Errorf("templates have %d MiB at most: %w", maxTemplateMemory>>20, errdefs.ErrInvalidArgument)
	}
	for {
		s.mu.Lock()
		_ = s.renew()
		e := s.entry(want)
		if e.state == templateIdle {
			e.set(templateWanted)
			s.kick()
		}
		state, err, attempts, changed := e.state, e.err, e.attempts, e.changed
		s.mu.Unlock()
		if state == templateReady {
			return nil
		}
		if state == templateFailed || err != nil && attempts > 0 && state == templateWanted {
			return fmt.Errorf("template of %d CPUs and %d MiB: %w", want.cpus, want.memory>>20, err)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-d.life.Done():
			return fmt.Errorf("the QEMU driver is closed: %w", errdefs.ErrUnavailable)
		}
	}
}
