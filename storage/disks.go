package storage

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"time"
)

// Disks is a back end that keeps volumes: disks that outlive the pod VMs that
// open them. It knows bytes, not file systems: those are made in the guest.
// storage/local (files in a host's datastores) and storage/vmdk (vSphere) are
// judged by storagetest.Disks.
//
// Every method may be called at any time from any goroutine, and again after a
// process was killed anywhere: an act that was begun is then finished, undone,
// or done by the next call with the same arguments. Errors wrap errdefs
// classes, name the object, and say the cure:
//
//	ErrInvalidArgument     a malformed claim, a policy or a source that does not fit
//	ErrNotFound            no such volume, snapshot, source or policy
//	ErrAlreadyExists       the name is taken by something else
//	ErrOutOfRange          a size that no datastore of the policy can ever give,
//	                       or that is smaller than the source
//	ErrResourceExhausted   no room now
//	ErrFailedPrecondition  in use: by a VM (HeldError; HeldElsewhereError if another
//	                       host could), or by what was made from it
//	ErrAborted             what was asked for is under way, and goes on: the same
//	                       call later finds it done, or says how far it is
//	ErrDataLoss            a file or record that is not what it should be;
//	                       nothing is deleted, formatted or repaired
//	ErrUnavailable         unknown: a datastore that is not mounted, a vCenter
//	                       that does not answer or does not let us in. It is
//	                       never read as "does not exist".
type Disks interface {
	Volumes
	Snapshots
	Attacher
	Pools
}

// Volumes makes and ends volumes.
type Volumes interface {
	// Create makes the volume a claim asks for, or returns the one of that
	// name if the claim could have made it (equal policy, source and topology
	// that fit, at least the size asked for), else ErrAlreadyExists. A volume
	// reads as zeroes, or as its source did; of an encrypted one only the first
	// MiB does, the rest is noise until it is written. Nothing counts until it
	// is whole.
	Create(ctx context.Context, c Claim) (Volume, error)
	// Get finds a volume by ID.
	Get(ctx context.Context, id string) (Volume, error)
	// List returns all volumes of all datastores that can be read, sorted by
	// ID. What cannot be read is told by the error, beside what could.
	List(ctx context.Context) ([]Volume, error)
	// Delete erases a volume. What is gone succeeds; ErrFailedPrecondition
	// while a VM holds it. Snapshots of it and clones from it stay whole.
	Delete(ctx context.Context, id string) error
	// Expand makes a volume at least bytes large, and never smaller. A volume
	// in use stays so; its holder sees the new size once its device was resized
	// to Volume.Bytes (vmpod.DiskResizer), or at the next Attach.
	Expand(ctx context.Context, id string, bytes int64) (Volume, error)
	// Used is what the volume takes on its datastore, in bytes. What it shares
	// with snapshots and clones may count for each of them.
	Used(ctx context.Context, id string) (int64, error)
}

// Snapshots keeps what volumes were at one instant.
type Snapshots interface {
	// Snapshot is idempotent on name: the same volume gives the snapshot that
	// is there, another one ErrAlreadyExists. It holds every write that was
	// acknowledged before the call, and is crash-consistent. A back end that
	// cannot do so while a VM writes says ErrFailedPrecondition.
	Snapshot(ctx context.Context, volumeID, name string, labels map[string]string) (Snapshot, error)
	GetSnapshot(ctx context.Context, id string) (Snapshot, error)
	// ListSnapshots returns the snapshots of a volume, or all if volumeID is
	// empty, sorted by ID; like List where datastores cannot be read.
	ListSnapshots(ctx context.Context, volumeID string) ([]Snapshot, error)
	// DeleteSnapshot erases a snapshot. What is gone succeeds. Volumes made
	// from it stay whole.
	DeleteSnapshot(ctx context.Context, id string) error
}

// Attacher gives volumes to VMs, each to one at a time.
type Attacher interface {
	// Attach fences, then says what vmpod.Driver must plug: a volume that
	// another holder has is a HeldError, which is ErrFailedPrecondition. The
	// same holder gets the same again (ErrFailedPrecondition if it asks for
	// another ReadOnly). It is called where the holder runs, before the plug.
	// A volume that is not what its record says is ErrDataLoss.
	Attach(ctx context.Context, id string, h Holder, o AttachOptions) (Attachment, error)
	// Detach ends h's hold; it is called once the device is unplugged or the
	// VM is off. If h holds nothing, or there is no such volume, it succeeds.
	Detach(ctx context.Context, id string, h Holder) error
	// Holders returns who holds the volume: one or none.
	Holders(ctx context.Context, id string) ([]Holder, error)
	// Fence ends every hold of h, of all of h.Host's VMs if h.VM is empty. The
	// caller vouches that they are off or cut from the storage: it is how the
	// out-of-service taint and an admin's word arrive here, never a timeout.
	// It returns the IDs of the volumes that were freed.
	Fence(ctx context.Context, h Holder) ([]string, error)
}

// Pools says what there is to claim from.
type Pools interface {
	// Policies returns what claims may name, sorted by name.
	Policies(ctx context.Context) ([]Policy, error)
	// Capacity is what claims with the policy can have now; a topology that is
	// not empty narrows it.
	Capacity(ctx context.Context, policy string, at Topology) (Capacity, error)
}

// An Auditor is a Disks that can tell whether volumes are kept as their
// policies say.
type Auditor interface {
	// Compliance judges one volume by what its policy says now. A back end that
	// cannot tell answers ComplianceUnknown with the reason; damage is a breach.
	Compliance(ctx context.Context, id string) (Compliance, error)
}

// An Inventory is a Disks that shows an admin all that lies in its datastores,
// also what nobody asks for any more. It changes nothing.
type Inventory interface {
	// Inventory returns what is there, and how each datastore is.
	Inventory(ctx context.Context) ([]Item, []DatastoreState)
}

// An Item is a volume, whole or not, or a file that no record stands for.
type Item struct {
	// Volume is what is known of it; of a damaged record ID and datastore alone.
	Volume
	// File is the name in its datastore of a file that no record stands for;
	// ID is empty then.
	File string
	// Used is what it takes of its datastore in bytes, -1 if that is not known.
	Used      int64
	Encrypted bool
	// Holder is who has it open, nil if nobody.
	Holder *Holder
	// Damage is why it is refused, empty if it is not.
	Damage string
	// Unfinished says that it is being made or deleted, and by which host.
	Unfinished string
	Compliance Compliance
}

// A DatastoreState is how a datastore is.
type DatastoreState struct {
	Name string
	// ID is empty if it was never met.
	ID string
	// Problem is why nothing of it is known now, empty if all is well.
	Problem string
}

// A Claim asks for a volume. It is plain data.
type Claim struct {
	// Name makes Create idempotent: 1 to 63 characters of [A-Za-z0-9._-], the
	// first a letter or digit, as in pvc-<uid>.
	Name string
	// Bytes is the least size; it is rounded up to whole MiB. 0 takes the
	// source's size.
	Bytes int64
	// Policy is the name of one of Policies.
	Policy string
	// At lists where the volume may be, best first. Empty: anywhere.
	At []Topology
	// Source is what the volume begins as; nil: zeroes.
	Source *Source
	// Labels are kept with the volume for people and for vSphere's CNS: see
	// the Label… constants.
	Labels map[string]string
	// Key encrypts the volume where the policy is Encrypted; nil: the back end
	// has a key of its own. It is ErrInvalidArgument with other policies.
	Key Key
}

// Keys of labels that back ends show where admins look.
const (
	LabelNamespace = "pvc-namespace"
	LabelPVC       = "pvc-name"
	LabelPV        = "pv-name"
)

// A Source is what a volume begins as: exactly one field is set.
type Source struct {
	SnapshotID string `json:"snapshotID,omitempty"`
	VolumeID   string `json:"volumeID,omitempty"`
}

// Topology says where a disk can be reached: an empty field does not matter.
type Topology struct {
	Zone string `json:"zone,omitempty"`
	// Host is a node's name.
	Host string `json:"host,omitempty"`
	// Datastore is the ID of one, the same on all hosts that have it.
	Datastore string `json:"datastore,omitempty"`
}

// Fits says whether what is at t can be where want wishes.
func (t Topology) Fits(want Topology) bool {
	fits := func(have, want string) bool { return have == "" || want == "" || have == want }
	return fits(t.Zone, want.Zone) && fits(t.Host, want.Host) && fits(t.Datastore, want.Datastore)
}

// A Volume is one that is there, whole.
type Volume struct {
	// ID is opaque: 1 to 128 characters of [A-Za-z0-9._-].
	ID, Name string
	Bytes    int64
	Policy   string
	// At is where it can be opened. Host is empty if its datastore is shared,
	// Datastore is always set.
	At Topology
	// Datastore is At.Datastore's name, for people.
	Datastore string
	// Format is how it lies there: one of the Format… constants.
	Format    string
	Source    *Source
	Labels    map[string]string
	CreatedAt time.Time
}

// Formats of disk files.
const (
	FormatRaw   = "raw"
	FormatQCOW2 = "qcow2"
	FormatLUKS  = "luks" // raw in a LUKS container, as QEMU and cryptsetup know it
	FormatVMDK  = "vmdk"
)

// A Snapshot of a volume.
type Snapshot struct {
	ID, Name string
	// VolumeID may name a volume that has since been deleted.
	VolumeID string
	// Bytes is the volume's size at that instant, the least size of a volume
	// made from it.
	Bytes     int64
	Policy    string
	At        Topology
	Labels    map[string]string
	CreatedAt time.Time
	// Ready: volumes can be made from it.
	Ready bool
}

// A Policy is a promise about the volumes made with it.
type Policy struct {
	// Name is a DNS label; the StorageClass has it too. ID is the back end's
	// own, empty if it has none but Name.
	Name, ID    string
	Description string
	// Thick: the bytes are reserved when the volume is made.
	Thick     bool
	Encrypted bool
	// IOPS and BytesPerSecond bound reads and writes together, a volume each;
	// 0 is no bound.
	IOPS, BytesPerSecond int64
	// Shared: volumes can be opened on more hosts than one, after each other.
	Shared bool
	// Datastores are those that fit, by ID.
	Datastores []string
	// Topology is where volumes can be, one entry per place.
	Topology []Topology
}

// Capacity of the datastores that fit a policy, in bytes.
type Capacity struct {
	Total, Available int64
	// MaxVolume is the largest volume that Create could make now.
	MaxVolume int64
}

// A Holder is who has a volume open: one VM on one host.
type Holder struct {
	// VM is the pod VM's ID (vmpod.ID.String).
	VM string `json:"vm"`
	// Host is the node's name.
	Host string `json:"host"`
}

func (h Holder) String() string { return "pod VM " + h.VM + " on host " + h.Host }

// AttachOptions are how a volume is to be opened.
type AttachOptions struct {
	// ReadOnly is enforced at the device.
	ReadOnly bool
	// Key opens a volume that was created with one.
	Key Key
}

// An Attachment is what a vmpod.Driver needs to plug a volume.
type Attachment struct {
	VolumeID string
	// DiskID is the serial by which the guest finds it: DiskID(VolumeID).
	DiskID string
	// Path is absolute on the host, or a datastore path as vSphere writes it.
	Path   string
	Format string
	Bytes  int64
	// Backing are the files below a qcow2 file, nearest first, opened read-only.
	Backing  []Layer
	ReadOnly bool
	// Thick: the guest's discards must not give the reserved bytes back.
	Thick bool
	// IOPS and BytesPerSecond bound the device, 0 is no bound.
	IOPS, BytesPerSecond int64
	// Key opens a FormatLUKS file.
	Key Key
}

// A Layer is a disk file that others build upon.
type Layer struct {
	Path   string `json:"path"`
	Format string `json:"format"`
}

// Compliance says whether a volume is kept as its policy says.
type Compliance struct {
	State ComplianceState
	// Message is a sentence for people, empty if compliant.
	Message string
	At      time.Time
}

// A ComplianceState is a CamelCase word.
type ComplianceState string

// States of compliance, as vSphere's SPBM has them.
const (
	Compliant         ComplianceState = "Compliant"
	NonCompliant      ComplianceState = "NonCompliant"
	ComplianceUnknown ComplianceState = "Unknown"
)

// DiskID is the ID of a volume's disk in every VM: 20 characters of [a-z0-9-].
func DiskID(volumeID string) string {
	sum := sha256.Sum256([]byte(volumeID))
	return "v-" + hex.EncodeToString(sum[:9])
}

// A Key is a secret: 16 to 512 bytes, in memory alone. It does not print, and
// encodes as null.
type Key []byte

// Format implements fmt.Formatter: every verb says only that there is a key.
func (k Key) Format(f fmt.State, _ rune) {
	if len(k) == 0 {
		_, _ = io.WriteString(f, "no key")
		return
	}
	_, _ = io.WriteString(f, "(secret)")
}

// LogValue implements slog.LogValuer.
func (k Key) LogValue() slog.Value { return slog.StringValue(fmt.Sprint(k)) }

// MarshalJSON keeps the key out of records.
func (k Key) MarshalJSON() ([]byte, error) { return []byte("null"), nil }
