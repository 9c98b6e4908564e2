package local

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/storage"
)

// A DisksConfig is what a host's volumes need.
type DisksConfig struct {
	// Host is the node's name.
	Host string
	// StateDir remembers which datastore was where, so that an empty mount
	// point is not taken for an empty datastore. It is made.
	StateDir   string
	Datastores []Datastore
	// BootID is the host's; by default the kernel's.
	BootID string
	// Live copies volumes that VMs of this host write to; nil: they are copied
	// when nobody does, where the file system shares no blocks.
	Live LiveCopier
	Log  *slog.Logger
}

// Disks implements storage.Disks on a host's datastores. Files of thin volumes
// are sparse; snapshots and clones share blocks where the file system can
// (XFS, btrfs), are overlays in a datastore of format qcow2, and else copies.
// While a VM writes, blocks are shared, or the VM copies (DisksConfig.Live). A
// thick volume never shares its own blocks; a snapshot of one does, so that space
// for what is written after it comes from what is free.
type Disks struct {
	cfg    DisksConfig
	filer  filer
	log    *slog.Logger
	stores *stores

	life   context.Context // of acts
	actsMu sync.Mutex
	acts   map[string]*act // by the ID of what is made
}

var _ storage.Disks = (*Disks)(nil)

// OpenDisks reads which datastores there are. One that is away is no error: it
// is looked for again whenever it is needed. What acts of this host that died
// have left is finished or undone. Copies go on when the calls that asked for
// them have ended, until ctx ends.
func OpenDisks(ctx context.Context, c DisksConfig) (*Disks, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if err := checkDatastores(c.Datastores); err != nil {
		return nil, err
	}
	if c.BootID == "" {
		b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return nil, err
		}
		c.BootID = strings.TrimSpace(string(b))
	}
	if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("datastores: %w", err)
	}
	x := &Disks{cfg: c, log: c.Log, stores: &stores{cfg: c, known: map[string]*datastore{}}, life: ctx, acts: map[string]*act{}}
	x.filer.qemuImg, _ = exec.LookPath("qemu-img") // needed by some volumes alone
	x.filer.qemuIO, _ = exec.LookPath("qemu-io")
	if err := x.Renew(ctx); err != nil {
		x.log.Warn("not all datastores are there", "err", err)
	}
	return x, nil
}

var dnsLabelRE = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

func checkDatastores(stores []Datastore) error {
	promised := map[string]storage.Policy{}
	seen := map[string]bool{}
	for _, d := range stores {
		switch {
		case !dnsLabelRE.MatchString(d.Name) || seen[d.Name]:
			return fmt.Errorf("datastore %q: want a DNS label that no other has: %w", d.Name, errdefs.ErrInvalidArgument)
		case !filepath.IsAbs(d.Path) || seen[filepath.Clean(d.Path)]:
			return fmt.Errorf("datastore %s: path %q: want an absolute one that no other has: %w", d.Name, d.Path, errdefs.ErrInvalidArgument)
		case d.Format != "" && d.Format != storage.FormatRaw && d.Format != storage.FormatQCOW2:
			return fmt.Errorf("datastore %s: format %q: want raw or qcow2: %w", d.Name, d.Format, errdefs.ErrInvalidArgument)
		}
		seen[d.Name], seen[filepath.Clean(d.Path)] = true, true
		for _, p := range d.Policies {
			have := storage.Policy{Name: p.Name, Thick: p.Thick, Encrypted: p.Encrypted, IOPS: p.IOPS, BytesPerSecond: p.BytesPerSecond, Shared: d.Shared}
			before, ok := promised[p.Name]
			switch {
			case !dnsLabelRE.MatchString(p.Name):
				return fmt.Errorf("datastore %s: policy %q: want a DNS label: %w", d.Name, p.Name, errdefs.ErrInvalidArgument)
			case p.IOPS < 0 || p.BytesPerSecond < 0:
				return fmt.Errorf("datastore %s: policy %s: a limit is negative: %w", d.Name, p.Name, errdefs.ErrInvalidArgument)
			case p.KeyFile != "" && !p.Encrypted:
				return fmt.Errorf("datastore %s: policy %s has a key file and is not encrypted: %w", d.Name, p.Name, errdefs.ErrInvalidArgument)
			case ok && !samePromise(before, have):
				return fmt.Errorf("datastore %s: policy %s promises something else than on another datastore: give it another name: %w", d.Name, p.Name, errdefs.ErrInvalidArgument)
			}
			promised[p.Name] = have
		}
	}
	return nil
}

func samePromise(a, b storage.Policy) bool {
	return a.Thick == b.Thick && a.Encrypted == b.Encrypted && a.IOPS == b.IOPS && a.BytesPerSecond == b.BytesPerSecond && a.Shared == b.Shared
}

var claimNameRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

const maxBytes = 62 << 40 // as vSphere's; QEMU and ext4 could do more

// Create implements storage.Volumes.
func (x *Disks) Create(ctx context.Context, c storage.Claim) (storage.Volume, error) {
	v, err := x.create(ctx, c)
	if err != nil {
		return v, explain("create volume "+c.Name, err)
	}
	return v, nil
}

func (x *Disks) create(ctx context.Context, c storage.Claim) (none storage.Volume, err error) {
	if err := checkClaim(c); err != nil {
		return none, err
	}
	c.Bytes = (c.Bytes + mib - 1) / mib * mib
	candidates, err := x.stores.with(c.Policy)
	if err != nil {
		return none, err
	}
	// It may be anywhere, also where the claim does not want it any more.
	all, _ := x.stores.all()
	for _, d := range all {
		v, found, err := x.existing(ctx, d, c)
		if errdefs.IsUnavailable(err) && !slices.Contains(candidates, d) {
			continue
		}
		if found || err != nil {
			return v, err
		}
	}
	var from *record
	if c.Source != nil {
		d, r, err := x.source(c)
		if err != nil {
			return none, err
		}
		if !slices.Contains(candidates, d) {
			return none, fmt.Errorf("policy %s is not offered by datastore %s, where its source is: %w", c.Policy, d.Name, errdefs.ErrInvalidArgument)
		}
		candidates, from = []*datastore{d}, r
		c.Bytes = cmp.Or(c.Bytes, r.Bytes)
		if c.Bytes < r.Bytes {
			return none, fmt.Errorf("%d bytes are less than its source's %d: %w", c.Bytes, r.Bytes, errdefs.ErrOutOfRange)
		}
	}
	d, err := choose(candidates, c)
	if err != nil {
		return none, err
	}
	if from == nil {
		return x.make(ctx, d, c, nil, nil)
	}
	id := volumeID(d.id, c.Name)
	if err := x.act(ctx, id, func(ctx context.Context, a *act) error {
		_, err := x.make(ctx, d, c, from, a)
		return err
	}); err != nil {
		return none, err
	}
	v, found, err := x.existing(ctx, d, c)
	if err == nil && !found {
		err = fmt.Errorf("it was deleted as soon as it was there: %w", errdefs.ErrUnavailable)
	}
	return v, err
}

func checkClaim(c storage.Claim) error {
	switch {
	case !claimNameRE.MatchString(c.Name):
		return fmt.Errorf("%q is no name of a volume: want 1 to 63 characters of [A-Za-z0-9._-]: %w", c.Name, errdefs.ErrInvalidArgument)
	case c.Bytes < 0 || c.Bytes == 0 && c.Source == nil:
		return fmt.Errorf("a volume of %d bytes: want more: %w", c.Bytes, errdefs.ErrInvalidArgument)
	case c.Bytes > maxBytes:
		return fmt.Errorf("a volume of %d bytes: want at most 62 TiB: %w", c.Bytes, errdefs.ErrOutOfRange)
	case c.Source != nil && (c.Source.SnapshotID == "") == (c.Source.VolumeID == ""):
		return fmt.Errorf("a source is a snapshot or a volume: %w", errdefs.ErrInvalidArgument)
	}
	return checkKey(c.Key)
}

func checkKey(k storage.Key) error {
	if k != nil && (len(k) < 16 || len(k) > 512) {
		return fmt.Errorf("a key of %d bytes: want 16 to 512: %w", len(k), errdefs.ErrInvalidArgument)
	}
	return nil
}

// existing finds the volume of a claim's name; ErrAlreadyExists if the claim
// could not have made it.
func (x *Disks) existing(ctx context.Context, d *datastore, c storage.Claim) (none storage.Volume, found bool, err error) {
	root, err := d.open()
	if err != nil {
		return none, false, err
	}
	defer root.Close()
	id := volumeID(d.id, c.Name)
	r, err := readRecord(root, id)
	if err != nil || r == nil {
		return none, false, err
	}
	if r.State != ready {
		// Another call is about it, or one that died was.
		if err := x.awaitAct(ctx, id); err != nil {
			return none, false, err
		}
		l, err := take(ctx, root, objectLock(id))
		if err != nil {
			return none, false, err
		}
		err = x.undo(root, id)
		l.release()
		if err != nil {
			return none, false, err
		}
		if r, err = readRecord(root, id); err != nil || r == nil {
			return none, false, err
		}
	}
	v := d.volume(*r)
	same := c.Source == nil && r.Source == nil || c.Source != nil && r.Source != nil && *c.Source == *r.Source
	fits := len(c.At) == 0 || slices.ContainsFunc(c.At, v.At.Fits)
	if r.Policy != c.Policy || r.Bytes < c.Bytes || !same || !fits || r.OwnKey != (c.Key != nil) {
		return none, false, fmt.Errorf("there is one of that name, of %d bytes and policy %s, on datastore %s: %w", r.Bytes, r.Policy, d.Name, errdefs.ErrAlreadyExists)
	}
	return v, true, nil
}

// choose finds the best datastore that has room.
func choose(candidates []*datastore, c storage.Claim) (*datastore, error) {
	wishes := c.At
	if len(wishes) == 0 {
		wishes = []storage.Topology{{}}
	}
	largest, fitting := int64(0), false
	for _, wish := range wishes {
		var best *datastore
		most := int64(-1)
		for _, d := range candidates {
			if !d.at().Fits(wish) {
				continue
			}
			fitting = true
			room, err := d.capacity()
			if err != nil {
				return nil, err
			}
			largest = max(largest, room.Total)
			if room.MaxVolume >= c.Bytes && room.Available > most {
				best, most = d, room.Available
			}
		}
		if best != nil {
			return best, nil
		}
	}
	switch {
	case !fitting:
		return nil, fmt.Errorf("policy %s has no datastore on %v: %w", c.Policy, wishes, errdefs.ErrInvalidArgument)
	case c.Bytes > largest:
		return nil, fmt.Errorf("%d bytes are more than any datastore of policy %s has (%d at most): %w", c.Bytes, c.Policy, largest, errdefs.ErrOutOfRange)
	}
	return nil, fmt.Errorf("no datastore of policy %s has %d bytes free: %w", c.Policy, c.Bytes, errdefs.ErrResourceExhausted)
}

// make records the intent, makes the file and says that it is whole.
func (x *Disks) make(ctx context.Context, d *datastore, c storage.Claim, from *record, a *act) (none storage.Volume, err error) {
	p, _ := d.policy(c.Policy)
	key, err := d.key(p, c.Key)
	if err != nil {
		return none, err
	}
	root, err := d.open()
	if err != nil {
		return none, err
	}
	defer root.Close()
	r := record{
		ID: volumeID(d.id, c.Name), Name: c.Name, State: making, By: x.cfg.Host, Bytes: c.Bytes,
		Policy: p.Name, Thick: p.Thick, Encrypted: p.Encrypted, IOPS: p.IOPS, BytesPerSecond: p.BytesPerSecond, OwnKey: c.Key != nil,
		Source: c.Source, Labels: maps.Clone(c.Labels), CreatedAt: time.Now().UTC().Truncate(time.Second),
	}
	locks := []int64{objectLock(r.ID)}
	if from != nil {
		locks = append(locks, objectLock(from.ID))
	}
	l, err := take(ctx, root, locks...)
	if err != nil {
		return none, err
	}
	defer l.release()
	// While we waited, somebody else may have made it.
	if v, found, err := x.existingLocked(root, d, r.ID, c); found || err != nil {
		return v, err
	}
	r.Disk = newFile(r.ID, d.format(p.Encrypted))
	if from == nil {
		err = x.makeEmpty(ctx, d, root, r, key)
	} else {
		err = x.makeFrom(ctx, d, root, &r, from.ID, a)
	}
	if err == nil {
		r.State, r.By, r.Makes = ready, "", nil
		err = r.write(root)
	}
	if err != nil {
		// Also when ctx is what ended. What cannot be undone now is later.
		if uerr := x.undo(root, r.ID); uerr != nil {
			x.log.Error("half a volume cannot be undone yet", "volume", r.ID, "err", uerr)
		}
		return none, err
	}
	failpoint.Hit(failpoint.VolumeReady)
	x.log.Info("volume made", "volume", r.ID, "name", r.Name, "bytes", r.Bytes, "policy", r.Policy, "datastore", d.Name)
	return d.volume(r), nil
}

func (x *Disks) makeEmpty(ctx context.Context, d *datastore, root *os.Root, r record, key storage.Key) error {
	if err := r.write(root); err != nil {
		return err
	}
	failpoint.Hit(failpoint.VolumeIntended)
	if err := x.filer.makeDisk(ctx, d, root, r, key); err != nil {
		return err
	}
	failpoint.Hit(failpoint.VolumeFileMade)
	return nil
}

// existingLocked is existing for the holder of the volume's lock.
func (x *Disks) existingLocked(root *os.Root, d *datastore, id string, c storage.Claim) (none storage.Volume, found bool, err error) {
	if err := x.undo(root, id); err != nil {
		return none, false, err
	}
	r, err := readRecord(root, id)
	if err != nil || r == nil {
		return none, false, err
	}
	return x.existing(context.Background(), d, c)
}

func (d *datastore) format(encrypted bool) string {
	switch {
	case encrypted:
		return storage.FormatLUKS
	case d.Format == storage.FormatQCOW2:
		return storage.FormatQCOW2
	}
	return storage.FormatRaw
}

// key is the one that a volume of a policy is made with, nil without.
func (d *datastore) key(p DatastorePolicy, own storage.Key) (storage.Key, error) {
	switch {
	case !p.Encrypted && own != nil:
		return nil, fmt.Errorf("policy %s is not encrypted, and the claim brings a key: %w", p.Name, errdefs.ErrInvalidArgument)
	case !p.Encrypted || own != nil:
		return own, nil
	case p.KeyFile == "":
		return nil, fmt.Errorf("policy %s is encrypted and has no key file on datastore %s: the claim must bring the key: %w", p.Name, d.Name, errdefs.ErrInvalidArgument)
	}
	return readKey(p.KeyFile)
}

// readKey reads a key file that its owner alone can read.
func readKey(path string) (storage.Key, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("key file: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	defer f.Close()
	st, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !st.Mode().IsRegular() || st.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("key file %s has mode %v: chmod 600 it: %w", path, st.Mode(), errdefs.ErrFailedPrecondition)
	}
	b := make([]byte, 513)
	n, _ := f.Read(b)
	if n < 16 || n > 512 {
		return nil, fmt.Errorf("key file %s has %d bytes, want 16 to 512: %w", path, n, errdefs.ErrFailedPrecondition)
	}
	return storage.Key(b[:n]), nil
}

// explain gives errors without a class the one that fits.
func explain(act string, err error) error {
	for _, class := range []error{errdefs.ErrInvalidArgument, errdefs.ErrNotFound, errdefs.ErrAlreadyExists, errdefs.ErrOutOfRange, errdefs.ErrResourceExhausted,
		errdefs.ErrFailedPrecondition, errdefs.ErrAborted, errdefs.ErrDataLoss, errdefs.ErrUnavailable, context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, class) {
			return fmt.Errorf("%s: %w", act, err)
		}
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%s: the datastore is full: free space there: %w: %w", act, err, errdefs.ErrResourceExhausted)
	}
	return fmt.Errorf("%s: %w: %w", act, err, errdefs.ErrUnavailable)
}
