package vmpod

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"
)

// An ID names one pod VM on every hypervisor: the pod's UID and the sandbox
// attempt. A second sandbox of the same pod may stand beside the first while
// that one is being removed, so the attempt is part of the identity.
type ID struct {
	PodUID  string `json:"podUID"`
	Attempt uint32 `json:"attempt"`
}

// UUID is the machine's UUID (SMBIOS, instanceUuid on vSphere). Attempt 0 of a
// pod whose UID is a UUID uses that UID itself; everything else is a UUIDv5 of
// both parts, so a second launch of the same ID always finds the first.
func (id ID) UUID() uuid.UUID {
	u, err := uuid.Parse(id.PodUID)
	if err == nil && id.Attempt == 0 {
		return u
	}
	if err != nil {
		u = uuid.NewSHA1(uuid.NameSpaceOID, []byte("atoll.dev/pod/"+id.PodUID))
	}
	return uuid.NewSHA1(u, []byte(strconv.FormatUint(uint64(id.Attempt), 10)))
}

// String is the form used in file names and logs: "<pod UID>_<attempt>".
func (id ID) String() string { return fmt.Sprintf("%s_%d", id.PodUID, id.Attempt) }

// ParseID is the inverse of ID.String.
func ParseID(s string) (ID, error) {
	i := strings.LastIndexByte(s, '_')
	if i <= 0 {
		return ID{}, fmt.Errorf("pod VM id %q: want <pod UID>_<attempt>", s)
	}
	n, err := strconv.ParseUint(s[i+1:], 10, 32)
	if err != nil {
		return ID{}, fmt.Errorf("pod VM id %q: attempt: %w", s, err)
	}
	return ID{PodUID: s[:i], Attempt: uint32(n)}, nil
}

// An Owner says for whom a VM runs. Drivers write it onto the VM so that an
// admin who meets the VM can tell, and so that List can rebuild it.
type Owner struct {
	PodUID    string `json:"podUID"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

// A Spec is everything a driver must know to start one pod VM, and nothing
// about how. Drivers never modify it.
type Spec struct {
	ID    ID    `json:"id"`
	Owner Owner `json:"owner"`
	// CPUs is the number of virtual CPUs, at least 1.
	CPUs int `json:"cpus"`
	// Memory is the VM's RAM in bytes, what containers may use plus the
	// guest's own share (Overhead). Drivers round it up to whole MiB.
	Memory int64 `json:"memory"`
	// Disks in the order in which the guest sees them at boot.
	Disks []Disk `json:"disks,omitempty"`
	NICs  []NIC  `json:"nics,omitempty"`
	// Shares are only ever plugged: Launch refuses a Spec with any.
	Shares []Share `json:"shares,omitempty"`
	// Pool groups VMs: a cgroup path on KVM, a resource pool on vSphere.
	Pool string `json:"pool,omitempty"`
}

// A Disk is a raw block device file (or VMDK descriptor) shown to the guest
// as a virtio disk. The guest finds it under its ID (the device's serial).
type Disk struct {
	// ID is unique within the VM: 1 to 20 characters of [a-z0-9-], as
	// virtio-blk's serial allows.
	ID string `json:"id"`
	// Path is absolute on the host.
	Path string `json:"path"`
	// Format is "raw" (the default when empty), "vmdk", and of a volume also
	// "qcow2" or "luks".
	Format string `json:"format,omitempty"`
	// ReadOnly is enforced at the device: the guest cannot write.
	ReadOnly bool `json:"readOnly,omitempty"`
	// Volume is set for a disk that outlives the VM. It is only ever plugged:
	// Launch refuses a Spec with any. A VM of which the driver finds no room on
	// the host for a volume's write is paused, with ReasonHostDiskFull, and
	// goes on once there is some.
	Volume *Volume `json:"volume,omitempty"`
}

// A Volume is what a disk that outlives the VM has beside any other.
type Volume struct {
	// ID is the back end's: on vSphere, the First Class Disk's.
	ID string `json:"id"`
	// Backing are the files below a qcow2 file, nearest first. They are opened
	// read-only; what the files themselves say is below them does not count.
	Backing []DiskFile `json:"backing,omitempty"`
	// Thick: the guest's discards do not give space back to the host.
	Thick bool `json:"thick,omitempty"`
	// IOPS and BytesPerSecond bound reads and writes together, 0 is no bound.
	// Drivers that leave that to the hypervisor's storage policy ignore them.
	IOPS           int64 `json:"iops,omitempty"`
	BytesPerSecond int64 `json:"bytesPerSecond,omitempty"`
	// Key opens a luks file: 16 to 512 bytes, never written down. Of a Machine's
	// Spec it is empty.
	Key []byte `json:"-"`
}

// A DiskFile is a file of a disk that consists of several.
type DiskFile struct {
	Path   string `json:"path"`
	Format string `json:"format"`
}

// Equal says whether two disks are the same, but for keys.
func (d Disk) Equal(o Disk) bool {
	a, b := d.Volume, o.Volume
	d.Volume, o.Volume = nil, nil
	if d != o || (a == nil) != (b == nil) {
		return false
	}
	return a == nil || a.ID == b.ID && slices.Equal(a.Backing, b.Backing) && a.Thick == b.Thick && a.IOPS == b.IOPS && a.BytesPerSecond == b.BytesPerSecond
}

// A NIC is one network interface. The host side (a persistent tap) exists
// before Launch and is owned by netplugin.
type NIC struct {
	// ID is unique within the VM: 1 to 20 characters of [a-z0-9-].
	ID string `json:"id"`
	// MAC is unicast. A guest that is a clone may not know it before its agent
	// is told (agentapi.PlaceholderMAC).
	MAC net.HardwareAddr `json:"mac"`
	// Tap is the name of the host's tap interface in the network namespace
	// of the driver's process.
	Tap string `json:"tap"`
	MTU int    `json:"mtu"`
}

// A Device is what a Plugger adds or removes: exactly one field is set.
type Device struct {
	Disk  *Disk
	NIC   *NIC
	Share *Share
}
