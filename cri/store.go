package cri

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/netplugin"
	"github.com/openatoll/atoll/vmpod"
)

// Buckets of the state file. A layout that an older version cannot read gets
// a new schema number.
var (
	bucketMeta       = []byte("meta")
	bucketSandboxes  = []byte("sandboxes")
	bucketContainers = []byte("containers")
	bucketIntents    = []byte("intents")
	bucketCursors    = []byte("cursors")
	keySchema        = []byte("schema")
)

const schema = "1"

// A sandbox is what is known of one pod sandbox. Records are immutable: a
// change replaces the record.
type sandbox struct {
	ID         string                       `json:"id"`
	VM         vmpod.ID                     `json:"vm"`
	Config     *runtimeapi.PodSandboxConfig `json:"-"`
	ConfigPB   []byte                       `json:"config"`
	Handler    string                       `json:"handler,omitempty"`
	State      runtimeapi.PodSandboxState   `json:"state"`
	CreatedAt  time.Time                    `json:"createdAt"`
	Hint       *vmpod.Hint                  `json:"hint,omitempty"`
	CPUs       int                          `json:"cpus"`
	Memory     int64                        `json:"memory"`
	Attachment netplugin.Attachment         `json:"attachment"`
	Volumes    []volume                     `json:"volumes,omitempty"`
	Features   []string                     `json:"features,omitempty"`
	// Reason and Message say why the sandbox is not ready.
	Reason  string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
	// Released is set once network, images and machine were given back.
	Released bool `json:"released,omitempty"`
}

// A container is what is known of one container; immutable as a sandbox is.
type container struct {
	ID          string                              `json:"id"`
	SandboxID   string                              `json:"sandboxID"`
	Config      *runtimeapi.ContainerConfig         `json:"-"`
	ConfigPB    []byte                              `json:"config"`
	ImageID     string                              `json:"imageID"`
	ImageRef    string                              `json:"imageRef"`
	State       runtimeapi.ContainerState           `json:"state"`
	CreatedAt   time.Time                           `json:"createdAt"`
	StartedAt   time.Time                           `json:"startedAt"`
	FinishedAt  time.Time                           `json:"finishedAt"`
	ExitCode    int32                               `json:"exitCode"`
	Reason      string                              `json:"reason,omitempty"`
	Message     string                              `json:"message,omitempty"`
	Mounts      []*runtimeapi.Mount                 `json:"mounts,omitempty"`
	LogPath     string                              `json:"logPath,omitempty"`
	Resources   *runtimeapi.LinuxContainerResources `json:"resources,omitempty"`
	User        *runtimeapi.LinuxContainerUser      `json:"user,omitempty"`
	StopSignal  runtimeapi.Signal                   `json:"stopSignal,omitempty"`
	Process     json.RawMessage                     `json:"process,omitempty"` // OCI Process, the base of every exec
	Termination *terminationLog                     `json:"termination,omitempty"`
}

// An intent is written before anything is made for a sandbox and erased in
// the transaction that records the sandbox, or once all was taken back.
type intent struct {
	VM vmpod.ID  `json:"vm"`
	At time.Time `json:"at"`
}

// An event is one change, as GetContainerEvents tells it.
type event struct {
	Seq    uint64
	PodUID string
	Msg    *runtimeapi.ContainerEventResponse
}

// noEvent marks a change that no observer needs to hear of.
const noEvent = runtimeapi.ContainerEventType(-1)

// A store holds the records in memory and on disk, and numbers their changes.
// Readers never wait for the disk.
type store struct {
	db      *bolt.DB
	secrets secretStore
	// write orders writers: the order on disk, in memory and of events is one.
	write sync.Mutex

	mu         sync.RWMutex
	sandboxes  map[string]*sandbox
	containers map[string]*container
	byVM       map[vmpod.ID]string
	seq        uint64
	subs       map[*subscription]struct{}
	behind     map[string]bool // ids of what the disk has refused; see settle

	shrunk chan struct{} // closed when behind shrinks

	refused chan struct{} // told when behind grows
}

// openStore opens or makes the state file; fresh is true when it held nothing.
func openStore(path string, secrets secretStore) (s *store, fresh bool, err error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 2 * time.Second})
	if err != nil {
		return nil, false, fmt.Errorf("state file %s: %w (is another spherelet using this data directory?)", path, err)
	}
	s = &store{
		db:         db,
		secrets:    secrets,
		sandboxes:  map[string]*sandbox{},
		containers: map[string]*container{},
		byVM:       map[vmpod.ID]string{},
		subs:       map[*subscription]struct{}{},
		behind:     map[string]bool{},
		shrunk:     make(chan struct{}),
		refused:    make(chan struct{}, 1),
	}
	if fresh, err = s.load(); err != nil {
		db.Close()
		return nil, false, fmt.Errorf("state file %s: %w", path, err)
	}
	return s, fresh, nil
}

func (s *store) load() (fresh bool, err error) {
	err = s.db.Update(func(tx *bolt.Tx) error {
		meta, err := tx.CreateBucketIfNotExists(bucketMeta)
		if err != nil {
			return err
		}
		switch v := meta.Get(keySchema); {
		case v == nil:
			fresh = true
			if err := meta.Put(keySchema, []byte(schema)); err != nil {
				return err
			}
		case string(v) != schema:
			return fmt.Errorf("written by another version (schema %q, this one reads %q): install that version or give an empty data directory: %w", v, schema, errdefs.ErrFailedPrecondition)
		}
		for _, b := range [][]byte{bucketSandboxes, bucketContainers, bucketIntents, bucketCursors} {
			if _, err := tx.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		err = tx.Bucket(bucketSandboxes).ForEach(func(k, v []byte) error {
			r := &sandbox{Config: &runtimeapi.PodSandboxConfig{}}
			if err := json.Unmarshal(v, r); err != nil {
				return fmt.Errorf("sandbox %s: %w", k, err)
			}
			if err := proto.Unmarshal(r.ConfigPB, r.Config); err != nil {
				return fmt.Errorf("sandbox %s: %w", k, err)
			}
			s.sandboxes[r.ID], s.byVM[r.VM] = r, r.ID
			return nil
		})
		if err != nil {
			return err
		}
		return tx.Bucket(bucketContainers).ForEach(func(k, v []byte) error {
			r := &container{Config: &runtimeapi.ContainerConfig{}}
			if err := json.Unmarshal(v, r); err != nil {
				return fmt.Errorf("container %s: %w", k, err)
			}
			if err := proto.Unmarshal(r.ConfigPB, r.Config); err != nil {
				return fmt.Errorf("container %s: %w", k, err)
			}
			if err := s.secrets.load(r); err != nil {
				return fmt.Errorf("container %s: %w", k, err)
			}
			s.containers[r.ID] = r
			return nil
		})
	})
	if err == nil {
		err = s.secrets.sweep(s.containers)
	}
	return fresh, err
}

func (s *store) close() error {
	s.mu.Lock()
	for sub := range s.subs {
		sub.end(nil)
	}
	clear(s.subs)
	s.mu.Unlock()
	return s.db.Close()
}

func put(tx *bolt.Tx, bucket []byte, key string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return tx.Bucket(bucket).Put([]byte(key), b)
}

// addSandbox records a new sandbox and erases its intent, in one transaction.
func (s *store) addSandbox(r *sandbox) error {
	s.write.Lock()
	defer s.write.Unlock()
	var err error
	if r.ConfigPB, err = proto.Marshal(r.Config); err != nil {
		return err
	}
	err = s.db.Update(func(tx *bolt.Tx) error {
		if err := tx.Bucket(bucketIntents).Delete([]byte(r.VM.String())); err != nil {
			return err
		}
		return put(tx, bucketSandboxes, r.ID, r)
	})
	if err != nil {
		return s.notRecorded("record sandbox", r.ID, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sandboxes[r.ID], s.byVM[r.VM] = r, r.ID
	s.emit(r.ID, r.ID, runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT)
	s.emit(r.ID, r.ID, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT)
	return nil
}

// updateSandbox replaces a sandbox's record by what change makes of a copy.
// What happened is true even when the disk refuses it: memory changes anyway
// and the error says that the disk did not.
func (s *store) updateSandbox(id string, ev runtimeapi.ContainerEventType, change func(*sandbox)) error {
	s.write.Lock()
	defer s.write.Unlock()
	old, ok := s.sandbox(id)
	if !ok {
		return fmt.Errorf("sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	r := *old
	r.Volumes = slices.Clone(old.Volumes)
	change(&r)
	err := s.db.Update(func(tx *bolt.Tx) error { return put(tx, bucketSandboxes, id, &r) })
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sandboxes[id] = &r
	s.late(id, err)
	if ev != noEvent {
		s.emit(id, id, ev)
	}
	if err != nil {
		return s.notRecorded("record sandbox", id, err)
	}
	return nil
}

// removeSandbox erases a sandbox and what containers it still has.
func (s *store) removeSandbox(id string) error {
	s.write.Lock()
	defer s.write.Unlock()
	old, ok := s.sandbox(id)
	if !ok {
		return nil
	}
	cs := s.containersOf(id)
	err := s.db.Update(func(tx *bolt.Tx) error {
		for _, c := range cs {
			if err := tx.Bucket(bucketContainers).Delete([]byte(c.ID)); err != nil {
				return err
			}
			if err := tx.Bucket(bucketCursors).Delete([]byte(c.ID)); err != nil {
				return err
			}
		}
		return tx.Bucket(bucketSandboxes).Delete([]byte(id))
	})
	for _, c := range cs {
		err = errors.Join(err, s.secrets.remove(c.ID))
	}
	if err != nil {
		return s.notRecorded("erase sandbox", id, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range cs {
		delete(s.containers, c.ID)
		s.caughtUp(c.ID)
	}
	delete(s.sandboxes, id)
	s.caughtUp(id)
	delete(s.byVM, old.VM)
	s.emitGone(old, id)
	return nil
}

// addContainer records a new container.
func (s *store) addContainer(r *container) error {
	s.write.Lock()
	defer s.write.Unlock()
	var err error
	if r.ConfigPB, err = proto.Marshal(publicConfig(r.Config)); err != nil {
		return err
	}
	err = s.secrets.save(r)
	failpoint.Hit(failpoint.CreateEnvironmentKept)
	if err == nil {
		err = s.db.Update(func(tx *bolt.Tx) error { return put(tx, bucketContainers, r.ID, r.withoutSecrets()) })
	}
	if err != nil {
		return errors.Join(s.notRecorded("record container", r.ID, err), s.secrets.remove(r.ID))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.containers[r.ID] = r
	s.emit(r.SandboxID, r.ID, runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT)
	return nil
}

// updateContainer is to containers what updateSandbox is to sandboxes. When
// change returns false, nothing happens.
func (s *store) updateContainer(id string, ev runtimeapi.ContainerEventType, change func(*container) bool) error {
	s.write.Lock()
	defer s.write.Unlock()
	old, ok := s.container(id)
	if !ok {
		return fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
	}
	r := *old
	if !change(&r) {
		return nil
	}
	err := s.db.Update(func(tx *bolt.Tx) error { return put(tx, bucketContainers, id, r.withoutSecrets()) })
	s.mu.Lock()
	defer s.mu.Unlock()
	s.containers[id] = &r
	s.late(id, err)
	if ev != noEvent {
		s.emit(r.SandboxID, r.ID, ev)
	}
	if err != nil {
		return s.notRecorded("record container", id, err)
	}
	return nil
}

// removeContainer erases a container.
func (s *store) removeContainer(id string) error {
	s.write.Lock()
	defer s.write.Unlock()
	old, ok := s.container(id)
	if !ok {
		return nil
	}
	err := s.db.Update(func(tx *bolt.Tx) error {
		if err := tx.Bucket(bucketCursors).Delete([]byte(id)); err != nil {
			return err
		}
		return tx.Bucket(bucketContainers).Delete([]byte(id))
	})
	failpoint.Hit(failpoint.RemoveRecordErased)
	if err = errors.Join(err, s.secrets.remove(id)); err != nil {
		return s.notRecorded("erase container", id, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.containers, id)
	s.caughtUp(id)
	s.emit(old.SandboxID, id, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT)
	return nil
}

func (s *store) sandbox(id string) (*sandbox, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r, ok := s.sandboxes[id]
	return r, ok
}

func (s *store) container(id string) (*container, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r, ok := s.containers[id]
	return r, ok
}

// sandboxOfVM finds the sandbox that a machine belongs to.
func (s *store) sandboxOfVM(vm vmpod.ID) (*sandbox, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	r, ok := s.sandboxes[s.byVM[vm]]
	return r, ok
}

// sandboxesOfPod returns a pod's sandboxes, the latest attempt first.
func (s *store) sandboxesOfPod(uid string) []*sandbox {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var out []*sandbox
	for _, r := range s.sandboxes {
		if r.VM.PodUID == uid {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b *sandbox) int { return int(b.VM.Attempt) - int(a.VM.Attempt) })
	return out
}

// allSandboxes returns every sandbox, the newest first.
func (s *store) allSandboxes() []*sandbox {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := slices.Collect(maps.Values(s.sandboxes))
	slices.SortFunc(out, func(a, b *sandbox) int { return b.CreatedAt.Compare(a.CreatedAt) })
	return out
}

// allContainers returns every container, the newest first.
func (s *store) allContainers() []*container {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := slices.Collect(maps.Values(s.containers))
	slices.SortFunc(out, func(a, b *container) int { return b.CreatedAt.Compare(a.CreatedAt) })
	return out
}

// containersOf returns a sandbox's containers, the oldest first.
func (s *store) containersOf(sandboxID string) []*container {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.containersOfLocked(sandboxID)
}

func (s *store) containersOfLocked(sandboxID string) []*container {
	var out []*container
	for _, c := range s.containers {
		if c.SandboxID == sandboxID {
			out = append(out, c)
		}
	}
	slices.SortFunc(out, func(a, b *container) int { return a.CreatedAt.Compare(b.CreatedAt) })
	return out
}

// addIntent notes that things are about to be made for vm.
func (s *store) addIntent(vm vmpod.ID) error {
	err := s.db.Update(func(tx *bolt.Tx) error {
		return put(tx, bucketIntents, vm.String(), intent{VM: vm, At: time.Now()})
	})
	if err != nil {
		return s.notRecorded("record the intent for pod VM", vm.String(), err)
	}
	return nil
}

// dropIntent says that nothing made for vm is left.
func (s *store) dropIntent(vm vmpod.ID) error {
	return s.db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketIntents).Delete([]byte(vm.String()))
	})
}

// hasIntent says whether something made for vm may be left.
func (s *store) hasIntent(vm vmpod.ID) (has bool, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		has = tx.Bucket(bucketIntents).Get([]byte(vm.String())) != nil
		return nil
	})
	return has, err
}

func (s *store) intents() ([]intent, error) {
	var out []intent
	err := s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketIntents).ForEach(func(_, v []byte) error {
			var i intent
			if err := json.Unmarshal(v, &i); err != nil {
				return err
			}
			out = append(out, i)
			return nil
		})
	})
	return out, err
}

// setCursor notes how far a container's log was written.
func (s *store) setCursor(containerID string, c logCursor) error {
	return s.db.Update(func(tx *bolt.Tx) error { return put(tx, bucketCursors, containerID, c) })
}

func (s *store) cursor(containerID string) (c logCursor, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		if v := tx.Bucket(bucketCursors).Get([]byte(containerID)); v != nil {
			return json.Unmarshal(v, &c)
		}
		return nil
	})
	return c, err
}
