package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/storage"
)

// stores finds the datastores of a configuration.
type stores struct {
	cfg   DisksConfig
	mu    sync.Mutex
	known map[string]*datastore // by name
}

// A memory is what StateDir has of a datastore that was met.
type memory struct {
	ID string `json:"id"`
}

func (s *stores) memoryOf(name string) string { return filepath.Join(s.cfg.StateDir, name+".json") }

// meet returns a datastore whose ID is known, whether it is there now or not.
// Its error is for one that this host has never seen.
func (s *stores) meet(c Datastore) (*datastore, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.known[c.Name]; d != nil {
		return d, nil
	}
	var m memory
	b, err := os.ReadFile(s.memoryOf(c.Name))
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	switch {
	case err == nil && validID(m.ID):
	case err != nil && errors.Is(err, fs.ErrNotExist):
		if m.ID, err = adopt(c); err != nil {
			return nil, err
		}
		if err := s.remember(c.Name, m); err != nil {
			return nil, err
		}
	default:
		return nil, c.unknown("%s, which says which datastore it was, cannot be read (%v): erase it if the right one is there", s.memoryOf(c.Name), err)
	}
	for _, other := range s.known {
		if other.id == m.ID {
			return nil, c.unknown("it is the datastore %s, which %s (%s) is, too", m.ID, other.Name, other.Path)
		}
	}
	d := &datastore{Datastore: c, id: m.ID, host: s.cfg.Host}
	s.known[c.Name] = d
	return d, nil
}

func (s *stores) remember(name string, m memory) error {
	root, err := os.OpenRoot(s.cfg.StateDir)
	if err != nil {
		return err
	}
	defer root.Close()
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return replace(root, name+".json", b)
}

// all returns the datastores that were ever met; the error names the others.
func (s *stores) all() ([]*datastore, error) {
	var found []*datastore
	var missing []error
	for _, c := range s.cfg.Datastores {
		d, err := s.meet(c)
		if err != nil {
			missing = append(missing, err)
			continue
		}
		found = append(found, d)
	}
	return found, errors.Join(missing...)
}

// with returns all datastores of a policy, or an error.
func (s *stores) with(policy string) ([]*datastore, error) {
	var found []*datastore
	offered := false
	for _, c := range s.cfg.Datastores {
		if !slices.ContainsFunc(c.Policies, func(p DatastorePolicy) bool { return p.Name == policy }) {
			continue
		}
		offered = true
		d, err := s.meet(c)
		if err != nil {
			return nil, err
		}
		found = append(found, d)
	}
	if !offered {
		return nil, fmt.Errorf("no datastore of node %s offers a policy %q: name one of its configuration: %w", s.cfg.Host, policy, errdefs.ErrNotFound)
	}
	return found, nil
}

// of returns the datastore of a volume's or snapshot's ID. An ID that is no
// datastore's is ErrNotFound; one of a datastore that this host does not have
// is ErrUnavailable: it may well exist.
func (s *stores) of(id, kind string) (*datastore, error) {
	ds, ok := datastoreOf(id, kind)
	if !ok {
		what := "volume"
		if kind == "s" {
			what = "snapshot"
		}
		return nil, fmt.Errorf("there is no %s %q: %w", what, id, errdefs.ErrNotFound)
	}
	all, missing := s.all()
	for _, d := range all {
		if d.id == ds {
			return d, nil
		}
	}
	if missing != nil {
		return nil, missing
	}
	return nil, fmt.Errorf("datastore %s is none of node %s's: declare it in the node's configuration: %w", ds, s.cfg.Host, errdefs.ErrUnavailable)
}

func (d *datastore) capacity() (storage.Capacity, error) {
	root, err := d.open()
	if err != nil {
		return storage.Capacity{}, err
	}
	defer root.Close()
	return space(root)
}

// Renew tells the other hosts of shared datastores that this one lives, and
// when it booted. It is to be called every minute or so. It also looks for
// datastores that were away, and on the first sight of each finishes or undoes
// what acts of this host that died have left there. Its error names the
// datastores that are not as they should be.
func (x *Disks) Renew(ctx context.Context) error {
	all, missing := x.stores.all()
	errs := []error{missing}
	for _, d := range all {
		if err := x.renew(ctx, d); err != nil {
			errs = append(errs, explain("datastore "+d.Name, err))
		}
	}
	return errors.Join(errs...)
}

// renewEvery is how often the others hear of this host. Nothing is decided by
// it: people read it.
const renewEvery = time.Minute

// KeepAlive calls Renew every minute until ctx ends, and logs what is new.
func (x *Disks) KeepAlive(ctx context.Context) {
	tick := time.NewTicker(renewEvery)
	defer tick.Stop()
	said := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := ""
		if err := x.Renew(ctx); err != nil {
			now = err.Error()
		}
		switch {
		case now == said || ctx.Err() != nil:
		case now == "":
			x.log.Info("all datastores are there again")
		default:
			x.log.Warn("not all datastores are there", "err", now)
		}
		said = now
	}
}

func (x *Disks) renew(ctx context.Context, d *datastore) error {
	root, err := d.open()
	if err != nil {
		return err
	}
	defer root.Close()
	if d.recovered.Load() {
		return x.sayAlive(root)
	}
	if err := makeDirs(root); err != nil {
		return err
	}
	if err := x.sayAlive(root); err != nil {
		return err
	}
	if err := x.recover(ctx, d, root); err != nil {
		return err
	}
	d.recovered.Store(true)
	return nil
}

// recover finishes or undoes this host's acts that died.
func (x *Disks) recover(ctx context.Context, d *datastore, root *os.Root) error {
	var errs []error
	for _, kind := range []string{"v", "s"} {
		all, err := ids(root, kind)
		if err != nil {
			return err
		}
		for _, id := range all {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err := x.recoverOne(root, id); err != nil {
				// It is refused whenever it is asked for; the others are not.
				x.log.Error("volume or snapshot cannot be recovered", "id", id, "datastore", d.Name, "err", err)
			}
		}
	}
	for _, dir := range []string{volumesDir, snapshotsDir, leasesDir} {
		errs = append(errs, eraseUnfinished(root, dir))
	}
	temps, err := fs.Glob(root.FS(), "."+markerFile+".*")
	errs = append(errs, err)
	for _, temp := range temps {
		errs = append(errs, erase(root, temp))
	}
	return errors.Join(errs...)
}

func (x *Disks) recoverOne(root *os.Root, id string) error {
	r, err := readRecord(root, id)
	if err != nil || r == nil || r.State == ready || r.By != x.cfg.Host {
		return err
	}
	l, err := tryTake(root, objectLock(id))
	if err != nil || l == nil { // who made it lives
		return err
	}
	defer l.release()
	return x.undo(root, id)
}

// eraseUnfinished removes records that were never put in their place.
func eraseUnfinished(root *os.Root, dir string) error {
	entries, err := fs.ReadDir(root.FS(), dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json"+newSuffix)
		if !ok {
			continue
		}
		l, err := tryTake(root, objectLock(id))
		if err != nil {
			return err
		}
		if l == nil {
			continue
		}
		err = erase(root, path.Join(dir, e.Name()))
		l.release()
		if err != nil {
			return err
		}
	}
	return nil
}

// undo ends what was left half-way of a volume or snapshot, whose lock the
// caller has: so whoever began it is dead. What is ready stays.
func (x *Disks) undo(root *os.Root, id string) error {
	r, err := readRecord(root, id)
	if err != nil || r == nil || r.State == ready {
		return err
	}
	x.log.Info("half a volume or snapshot is erased", "id", id, "state", r.State)
	return eraseAll(root, *r)
}

// eraseAll removes a record and all files that no other stands for.
func eraseAll(root *os.Root, r record) error {
	// Of two that have a file in common the last must see that it is.
	l, err := take(context.Background(), root, recordsLock)
	if err != nil {
		return err
	}
	defer l.release()
	used := map[string]bool{}
	if sharesFiles(r) {
		if used, err = referenced(root, r.ID); err != nil {
			return fmt.Errorf("what shares files with %s is not known: %w", r.ID, err)
		}
	}
	for _, f := range r.files() {
		if used[f.Name] {
			continue
		}
		if err := erase(root, f.path()); err != nil {
			return err
		}
	}
	failpoint.Hit(failpoint.VolumeFilesErased)
	return erase(root, recordPath(r.ID))
}

// sharesFiles says whether other records may stand for some of r's files.
func sharesFiles(r record) bool {
	return r.Disk.Format == storage.FormatQCOW2 || len(r.Backing) > 0 || len(r.Makes) > 0
}
