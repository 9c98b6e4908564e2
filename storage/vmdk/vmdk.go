// Package vmdk is storage.Disks on vSphere: each volume is a First Class Disk
// that Cloud Native Storage knows, with the storage policy of its claim, and
// with what the cluster says of it (claim, volume, namespace, pod), so that the
// vSphere client shows whose it is.
//
// vCenter is the store of record; nothing is kept beside it. A volume bears the
// cluster's id and labels of its own: what does not is never touched. A call
// whose outcome is not known is ErrUnavailable, and the next one looks first at
// what has become of it, and at what a process before this one had begun.
package vmdk

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/internal/keylock"
	"github.com/openatoll/atoll/internal/vsphere"
	"github.com/openatoll/atoll/storage"
)

type ref = types.ManagedObjectReference

const mib = 1 << 20

// Options say whose volumes these are, and where.
type Options struct {
	// VCenter to be signed in at.
	VCenter vsphere.Config
	// Cluster is the Kubernetes cluster's id, the mark of its volumes: 1 to 64
	// characters, unique among the clusters of a vCenter.
	Cluster string
	// Instance is the vSphere instance UUID of a pod VM, by Holder.VM.
	Instance func(vm string) (string, error)
	// PolicyName is the name in Kubernetes of a storage policy; nil or an empty
	// answer: its name in vSphere as a DNS label. Optional.
	PolicyName func(id, name string) string
	// Logger; nil: slog.Default().
	Logger *slog.Logger
}

// Disks is storage.Disks and storage.Auditor. Run has to run: it is how the ends
// of tasks are heard.
type Disks struct {
	options  Options
	log      *slog.Logger
	session  *vsphere.Session
	watch    *vsphere.Watch
	tasks    *vsphere.Tasks
	services services
	stores   stores
	policies policyCache
	locks    keylock.Locks[string]
	past     past
}

var (
	_ storage.Disks   = (*Disks)(nil)
	_ storage.Auditor = (*Disks)(nil)
)

// New makes no call.
func New(o Options) (*Disks, error) {
	if len(o.Cluster) < 1 || len(o.Cluster) > 64 || o.Instance == nil {
		return nil, fmt.Errorf("volumes on vCenter %s: a cluster id of 1 to 64 characters and a way to find pods' VMs are needed: %w", o.VCenter.Address, errdefs.ErrInvalidArgument)
	}
	session, err := vsphere.NewSession(o.VCenter)
	if err != nil {
		return nil, err
	}
	d := &Disks{options: o, log: o.Logger, session: session}
	if d.log == nil {
		d.log = slog.Default()
	}
	d.log = d.log.With("component", "vmdk")
	d.stores.init()
	d.past.init()
	d.services.init(session)
	d.watch = vsphere.NewWatch(session, vsphere.WatchConfig{Types: watched}, &d.stores)
	d.tasks = vsphere.NewTasks(d.watch)
	return d, nil
}

// Run watches vCenter until ctx is done, and returns nil then.
func (d *Disks) Run(ctx context.Context) error {
	defer d.session.Logout(context.WithoutCancel(ctx))
	return d.watch.Run(ctx)
}

// watched is what is known of without asking.
var watched = map[string][]string{
	"Datastore":  {"name", "host", "summary.url", "summary.capacity", "summary.freeSpace", "summary.accessible", "summary.maintenanceMode"},
	"HostSystem": {"name"},
}

// A store is a datastore.
type store struct {
	id, name, url  string
	capacity, free int64
	lost, resting  bool  // not accessible; in maintenance, or about to be
	hosts          []ref // that mount it
}

// stores are all datastores and the hosts' names, as the watch shows them.
type stores struct {
	mu     sync.Mutex
	byID   map[string]*store
	hosts  map[ref]string
	synced chan struct{} // closed once all are there
	err    error         // why they are not
	once   sync.Once
}

func (s *stores) init() {
	s.byID, s.hosts, s.synced = map[string]*store{}, map[ref]string{}, make(chan struct{})
}

// Replace is vsphere.Viewer's.
func (s *stores) Replace(all []vsphere.Update) {
	s.mu.Lock()
	s.byID, s.hosts, s.err = map[string]*store{}, map[ref]string{}, nil
	s.mu.Unlock()
	s.Apply(all)
	s.once.Do(func() { close(s.synced) })
}

// Apply is vsphere.Viewer's.
func (s *stores) Apply(changes []vsphere.Update) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, u := range changes {
		switch {
		case u.Object.Type == "HostSystem" && u.Gone:
			delete(s.hosts, u.Object)
		case u.Object.Type == "HostSystem":
			if name, ok := u.Props["name"].(string); ok {
				s.hosts[u.Object] = name
			}
		case u.Gone:
			delete(s.byID, u.Object.Value)
		default:
			at := s.byID[u.Object.Value]
			if at == nil {
				at = &store{id: u.Object.Value}
				s.byID[at.id] = at
			}
			at.apply(u.Props)
		}
	}
}

func (at *store) apply(props map[string]types.AnyType) {
	for name, value := range props {
		switch v := value.(type) {
		case string:
			switch name {
			case "name":
				at.name = v
			case "summary.url":
				at.url = v
			case "summary.maintenanceMode":
				at.resting = v != string(types.DatastoreSummaryMaintenanceModeStateNormal)
			}
		case int64:
			if name == "summary.capacity" {
				at.capacity = v
			} else {
				at.free = v
			}
		case bool:
			at.lost = !v
		case types.ArrayOfDatastoreHostMount:
			at.hosts = nil
			for _, m := range v.DatastoreHostMount {
				at.hosts = append(at.hosts, m.Key)
			}
		}
	}
}

// Lost is vsphere.Viewer's: what was seen stays, and is shown as it was.
func (s *stores) Lost(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

// list returns the datastores by name, once they have been seen.
func (s *stores) list(ctx context.Context) ([]store, error) {
	select {
	case <-s.synced:
	case <-ctx.Done():
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.err != nil {
			return nil, fmt.Errorf("the datastores: %w", s.err)
		}
		return nil, fmt.Errorf("vCenter's datastores have not been seen yet: %w: %w", ctx.Err(), errdefs.ErrUnavailable)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]store, 0, len(s.byID))
	for _, at := range s.byID {
		all = append(all, *at)
	}
	slices.SortFunc(all, func(a, b store) int { return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(a.id, b.id)) })
	return all, nil
}

func (s *stores) host(id ref) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hosts[id]
}

// topology is where a datastore can be reached.
func (s *stores) topology(at store) storage.Topology {
	t := storage.Topology{Datastore: at.id}
	if len(at.hosts) == 1 {
		t.Host = s.host(at.hosts[0])
	}
	return t
}

// hold waits until no other call works on what key names.
func (d *Disks) hold(ctx context.Context, key string) (release func(), err error) {
	if release, err = d.locks.Lock(ctx, key); err != nil {
		return nil, fmt.Errorf("nothing was done on volume %w: %w", err, errdefs.ErrUnavailable)
	}
	return release, nil
}
