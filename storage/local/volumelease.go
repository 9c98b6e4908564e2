package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/storage"
)

// A lease says who has a volume open. It lasts until Detach or Fence, or until
// its host has booted again, of which a lease's and a host's boot ID are the
// proof. Time alone ends none: a host that is silent may still be writing.
type lease struct {
	Version int            `json:"version"`
	Volume  string         `json:"volume"`
	Holder  storage.Holder `json:"holder"`
	// BootID is of the holder's host.
	BootID   string    `json:"bootID"`
	ReadOnly bool      `json:"readOnly,omitempty"`
	Since    time.Time `json:"since"`
	// Limits are those of the policy when it began, which its device has; nil
	// in a lease of an older Atoll.
	Limits *limits `json:"limits,omitempty"`
}

// A hostRecord is what a host says of itself in a shared datastore.
type hostRecord struct {
	Host   string    `json:"host"`
	BootID string    `json:"bootID"`
	Alive  time.Time `json:"alive"`
}

var hostRE = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)

func leasePath(id string) string  { return path.Join(leasesDir, id+".json") }
func hostPath(host string) string { return path.Join(hostsDir, host+".json") }

func (x *Disks) sayAlive(root *os.Root) error {
	b, err := json.Marshal(hostRecord{x.cfg.Host, x.cfg.BootID, time.Now().UTC().Truncate(time.Second)})
	if err != nil {
		return err
	}
	l, err := take(context.Background(), root, objectLock("host/"+x.cfg.Host))
	if err != nil {
		return err
	}
	defer l.release()
	return replace(root, hostPath(x.cfg.Host), b)
}

// readLease returns nil if nobody has the volume.
func readLease(root *os.Root, id string) (*lease, error) {
	b, err := root.ReadFile(leasePath(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("lease of %s: %w: %w", id, err, errdefs.ErrUnavailable)
	}
	var l lease
	if err := json.Unmarshal(b, &l); err != nil || l.Version != layoutVersion || l.Volume != id || l.Holder.VM == "" || l.Holder.Host == "" {
		return nil, fmt.Errorf("%s, which says who has volume %s open, is damaged (%v): see to it that no VM has, then erase it: %w", leasePath(id), id, err, errdefs.ErrDataLoss)
	}
	return &l, nil
}

func (l lease) write(root *os.Root) error {
	b, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return err
	}
	return replace(root, leasePath(l.Volume), b)
}

// stale says whether the holder's host has booted since, so that its VM is no
// more; if not, detail is what is known of the host.
func (x *Disks) stale(root *os.Root, l lease) (stale bool, detail string) {
	if l.Holder.Host == x.cfg.Host {
		return l.BootID != x.cfg.BootID, ""
	}
	b, err := root.ReadFile(hostPath(l.Holder.Host))
	if err != nil {
		return false, "its host has not been heard of"
	}
	var h hostRecord
	if err := json.Unmarshal(b, &h); err != nil || h.Host != l.Holder.Host || h.BootID == "" {
		return false, "its host has not been heard of"
	}
	return h.BootID != l.BootID, "its host was last heard of at " + h.Alive.Format(time.RFC3339)
}

// holding returns the lease that counts, nil if there is none.
func (x *Disks) holding(root *os.Root, id string) (*lease, string, error) {
	l, err := readLease(root, id)
	if err != nil || l == nil {
		return nil, "", err
	}
	stale, detail := x.stale(root, *l)
	if stale {
		return nil, "", nil
	}
	return l, detail, nil
}

// Attach implements storage.Attacher.
func (x *Disks) Attach(ctx context.Context, id string, h storage.Holder, o storage.AttachOptions) (storage.Attachment, error) {
	a, err := x.attach(ctx, id, h, o)
	if err != nil {
		return a, explain("attach volume "+id, err)
	}
	return a, nil
}

func (x *Disks) attach(ctx context.Context, id string, h storage.Holder, o storage.AttachOptions) (none storage.Attachment, err error) {
	if err := x.checkHolder(h); err != nil {
		return none, err
	}
	if err := checkKey(o.Key); err != nil {
		return none, err
	}
	d, root, r, l, err := x.lockVolume(ctx, id)
	if err != nil {
		return none, err
	}
	defer root.Close()
	defer l.release()
	key, err := d.keyOf(*r, o.Key)
	if err != nil {
		return none, err
	}
	held, detail, err := x.holding(root, id)
	switch {
	case err != nil:
		return none, err
	case held != nil && held.Holder != h:
		return none, &storage.HeldError{VolumeID: id, Holder: held.Holder, Detail: detail}
	case held != nil && held.ReadOnly != o.ReadOnly:
		return none, fmt.Errorf("%s has it with readOnly=%t: detach it first: %w", h, held.ReadOnly, errdefs.ErrFailedPrecondition)
	}
	if err := check(root, *r); err != nil {
		return none, err
	}
	if held == nil {
		if err := x.begin(ctx, d, root, r, h, o.ReadOnly); err != nil {
			return none, err
		}
	}
	a := d.attachment(*r, o.ReadOnly, key)
	if held != nil && held.Limits != nil {
		// Its device has these: another's would be refused.
		a.IOPS, a.BytesPerSecond = held.Limits.IOPS, held.Limits.BytesPerSecond
	}
	return a, nil
}

func (x *Disks) checkHolder(h storage.Holder) error {
	switch {
	case h.VM == "" || len(h.VM) > 128:
		return fmt.Errorf("holder %q: want the pod VM's ID: %w", h.VM, errdefs.ErrInvalidArgument)
	case h.Host != x.cfg.Host:
		return fmt.Errorf("%s is not on host %s, where it is to be attached: %w", h, x.cfg.Host, errdefs.ErrInvalidArgument)
	}
	return nil
}

// begin makes h the holder.
func (x *Disks) begin(ctx context.Context, d *datastore, root *os.Root, r *record, h storage.Holder, readOnly bool) error {
	// The kernel knows better than any file, on this host and through NFS.
	open, err := opened(root, r.Disk.path())
	if err != nil {
		return err
	}
	if open {
		return fmt.Errorf("a QEMU has its file %s open that no lease speaks of: end that VM: %w", d.path(r.Disk.path()), errdefs.ErrFailedPrecondition)
	}
	if err := x.settle(ctx, d, root, r); err != nil {
		return err
	}
	if err := x.sayAlive(root); err != nil {
		return err
	}
	l := lease{Version: layoutVersion, Volume: r.ID, Holder: h, BootID: x.cfg.BootID, ReadOnly: readOnly, Since: time.Now().UTC().Truncate(time.Second)}
	l.Limits = d.limitsOf(*r)
	if err := l.write(root); err != nil {
		return err
	}
	failpoint.Hit(failpoint.VolumeLeased)
	return nil
}

// limitsOf are those that hold from the next attach: the admin's latest.
func (d *datastore) limitsOf(r record) *limits {
	if p, ok := d.policy(r.Policy); ok {
		return &limits{p.IOPS, p.BytesPerSecond}
	}
	return &limits{r.IOPS, r.BytesPerSecond}
}

func (d *datastore) attachment(r record, readOnly bool, key storage.Key) storage.Attachment {
	now := d.limitsOf(r)
	a := storage.Attachment{
		VolumeID: r.ID, DiskID: storage.DiskID(r.ID), Path: d.path(r.Disk.path()), Format: r.Disk.Format, Bytes: max(r.Bytes, r.Growing),
		ReadOnly: readOnly, Thick: r.Thick, IOPS: now.IOPS, BytesPerSecond: now.BytesPerSecond,
	}
	for _, f := range r.Backing {
		a.Backing = append(a.Backing, storage.Layer{Path: d.path(f.path()), Format: f.Format})
	}
	if key != nil {
		a.Key = passphrase(key)
	}
	return a
}

// keyOf is the key that opens a volume, nil if it is not encrypted.
func (d *datastore) keyOf(r record, own storage.Key) (storage.Key, error) {
	switch {
	case !r.Encrypted:
		return nil, nil
	case r.OwnKey && own == nil:
		return nil, fmt.Errorf("it was made with a key of its claim, which must come along: %w", errdefs.ErrInvalidArgument)
	case r.OwnKey:
		return own, nil
	}
	p, ok := d.policy(r.Policy)
	if !ok || p.KeyFile == "" {
		return nil, fmt.Errorf("policy %s, whose key file opens it, is no longer one of datastore %s with a key file: declare it again: %w", r.Policy, d.Name, errdefs.ErrFailedPrecondition)
	}
	return readKey(p.KeyFile)
}

// Detach implements storage.Attacher. A file that QEMU still has open stays
// attached (ErrFailedPrecondition).
func (x *Disks) Detach(ctx context.Context, id string, h storage.Holder) error {
	if err := x.detach(ctx, id, h); err != nil {
		return explain("detach volume "+id, err)
	}
	return nil
}

func (x *Disks) detach(ctx context.Context, id string, h storage.Holder) error {
	d, err := x.stores.of(id, "v")
	if err != nil {
		if errdefs.IsNotFound(err) {
			return nil
		}
		return err
	}
	root, err := d.open()
	if err != nil {
		return err
	}
	defer root.Close()
	l, err := take(ctx, root, objectLock(id))
	if err != nil {
		return err
	}
	defer l.release()
	held, err := readLease(root, id)
	if err != nil || held == nil || held.Holder != h {
		return err
	}
	r, err := readRecord(root, id)
	if err == nil && r != nil {
		open, oerr := opened(root, r.Disk.path())
		if open && oerr == nil {
			return fmt.Errorf("QEMU still has %s open: unplug the disk or end %s: %w", d.path(r.Disk.path()), h, errdefs.ErrFailedPrecondition)
		}
	}
	return endLease(root, id)
}

func endLease(root *os.Root, id string) error {
	err := erase(root, leasePath(id))
	if err == nil {
		failpoint.Hit(failpoint.VolumeLeaseEnded)
	}
	return err
}

// Holders implements storage.Attacher.
func (x *Disks) Holders(_ context.Context, id string) ([]storage.Holder, error) {
	hs, err := x.holders(id)
	if err != nil {
		return nil, explain("holders of volume "+id, err)
	}
	return hs, nil
}

func (x *Disks) holders(id string) ([]storage.Holder, error) {
	d, root, r, err := x.openVolume(id)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if r == nil {
		return nil, noVolume(d, id)
	}
	held, _, err := x.holding(root, id)
	if err != nil || held == nil {
		return nil, err
	}
	return []storage.Holder{held.Holder}, nil
}

// Fence implements storage.Attacher. On a datastore that is away nothing is
// fenced, and that is an error.
func (x *Disks) Fence(ctx context.Context, h storage.Holder) ([]string, error) {
	if !hostRE.MatchString(h.Host) {
		return nil, fmt.Errorf("fence %q: want a host's name: %w", h.Host, errdefs.ErrInvalidArgument)
	}
	all, missing := x.stores.all()
	errs := []error{missing}
	var freed []string
	for _, d := range all {
		f, err := x.fence(ctx, d, h)
		freed = append(freed, f...)
		if err != nil {
			errs = append(errs, explain("fence "+h.String()+" on datastore "+d.Name, err))
		}
	}
	slices.Sort(freed)
	return freed, errors.Join(errs...)
}

func (x *Disks) fence(ctx context.Context, d *datastore, h storage.Holder) ([]string, error) {
	root, err := d.open()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	entries, err := fs.ReadDir(root.FS(), leasesDir)
	if err != nil {
		return nil, err
	}
	var freed []string
	var errs []error
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		done, err := fenceOne(ctx, root, id, h)
		if done {
			freed = append(freed, id)
			x.log.Warn("volume taken from a holder that is said to be off", "volume", id, "vm", h.VM, "host", h.Host)
		}
		errs = append(errs, err)
	}
	return freed, errors.Join(errs...)
}

func fenceOne(ctx context.Context, root *os.Root, id string, h storage.Holder) (bool, error) {
	l, err := take(ctx, root, objectLock(id))
	if err != nil {
		return false, err
	}
	defer l.release()
	held, err := readLease(root, id)
	if err != nil || held == nil || held.Holder.Host != h.Host || h.VM != "" && held.Holder.VM != h.VM {
		return false, err
	}
	return true, endLease(root, id)
}
