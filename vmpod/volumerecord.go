package vmpod

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// VolumeRecordName is the file by which a host directory that the kubelet
// believes to be a mounted volume says what the guest must make instead.
// Prior art: mountInfo.json of Kata's pkg/direct-volume.
const VolumeRecordName = ".atoll-volume.json"

// A VolumeRecord stands in a volume's host directory for a volume that lives
// in the guest alone.
type VolumeRecord struct {
	// Kind is VolumeEmptyDir or VolumeDisk.
	Kind string `json:"kind"`
	// Medium is "" (the pod's ephemeral disk) or "Memory" (a tmpfs).
	Medium string `json:"medium,omitempty"`
	// SizeLimit is in bytes, 0 for none. For memory it is the tmpfs's size. On
	// the disk the kubelet evicts the pod whose volume has exceeded it; a guest
	// with quotas lets the volume exceed it by 1 MiB at most.
	SizeLimit int64 `json:"sizeLimit,omitempty"`
	// FSGroup owns the volume's root directory (mode 2777), if set. Of a disk it
	// owns all that is in it: upstream's rules for what the kubelet mounts.
	FSGroup *int64 `json:"fsGroup,omitempty"`
	// Disk is set when Kind is VolumeDisk.
	Disk *DiskRecord `json:"disk,omitempty"`
}

// Kinds of volumes.
const (
	VolumeEmptyDir = "emptyDir"
	VolumeDisk     = "disk"
)

// A DiskRecord names a disk that outlives pods and says how the pod's guest is
// to use it. One VM has it at a time, since a file system that two kernels mount
// is lost: that serves ReadWriteOnce and ReadWriteOncePod alike.
type DiskRecord struct {
	// VolumeID is what the storage that made the disk knows it by.
	VolumeID string `json:"volumeID"`
	// FSType is "ext4" (the default when empty) or "xfs"; not with Block.
	FSType string `json:"fsType,omitempty"`
	// Options of the mount, of those that CheckMountOptions allows.
	Options []string `json:"options,omitempty"`
	// ReadOnly is enforced at the device: the guest cannot write.
	ReadOnly bool `json:"readOnly,omitempty"`
	// Block gives containers the device itself, in a file of the host that
	// WriteBlockRecord wrote.
	Block bool `json:"block,omitempty"`
	// FSGroupChangePolicy is "Always" (the default when empty) or
	// "OnRootMismatch".
	FSGroupChangePolicy string `json:"fsGroupChangePolicy,omitempty"`
}

// Policies of DiskRecord.FSGroupChangePolicy.
const (
	FSGroupAlways         = "Always"
	FSGroupOnRootMismatch = "OnRootMismatch"
)

// mountOptions are what a file system of a disk may be mounted with. None of
// them can cost data that was acknowledged, as nobarrier would, or reach
// beyond the file system.
var mountOptions = map[string]bool{
	"ro": true, "rw": true, "defaults": true, "discard": true, "nodiscard": true,
	"noatime": true, "relatime": true, "strictatime": true, "nodiratime": true, "lazytime": true, "nolazytime": true,
	"nodev": true, "nosuid": true, "noexec": true, "dev": true, "suid": true, "exec": true,
	"sync": true, "dirsync": true, "async": true,
}

// CheckMountOptions refuses, with ErrInvalidArgument, options that a guest
// would not mount a disk with.
func CheckMountOptions(options []string) error {
	for _, o := range options {
		if !mountOptions[o] {
			return fmt.Errorf("mount option %q: a pod VM mounts disks with %s only: remove it from mountOptions: %w",
				o, strings.Join(slices.Sorted(maps.Keys(mountOptions)), ", "), errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// Check refuses, with ErrInvalidArgument, a record that no guest could honour.
func (d *DiskRecord) Check() error {
	var why string
	switch {
	case d.VolumeID == "":
		why = "it names no volume"
	case d.Block && (d.FSType != "" || len(d.Options) > 0):
		why = "a raw block volume has no file system and no mount options"
	case !d.Block && d.FSType != "" && d.FSType != "ext4" && d.FSType != "xfs":
		why = fmt.Sprintf("file system %q: use ext4 or xfs", d.FSType)
	case d.FSGroupChangePolicy != "" && d.FSGroupChangePolicy != FSGroupAlways && d.FSGroupChangePolicy != FSGroupOnRootMismatch:
		why = fmt.Sprintf("fsGroupChangePolicy %q: use %s or %s", d.FSGroupChangePolicy, FSGroupAlways, FSGroupOnRootMismatch)
	default:
		return CheckMountOptions(d.Options)
	}
	return fmt.Errorf("volume %s: %s: %w", d.VolumeID, why, errdefs.ErrInvalidArgument)
}

// WriteVolumeRecord puts the record into the volume directory dir. It is there
// as a whole or not at all, whenever the host fails.
func WriteVolumeRecord(dir string, r VolumeRecord) error {
	return writeRecord(filepath.Join(dir, VolumeRecordName), r)
}

// WriteBlockRecord makes the regular file that stands for a raw block volume
// where the kubelet wants a device. The kubelet links to it from the pod's
// directory, and that link is what the runtime gets as a device of a container.
func WriteBlockRecord(file string, r VolumeRecord) error { return writeRecord(file, r) }

// RemoveVolumeRecord removes the record of the volume directory dir, and what a
// crash may have left beside it. Removing what is gone succeeds.
func RemoveVolumeRecord(dir string) error {
	return RemoveBlockRecord(filepath.Join(dir, VolumeRecordName))
}

// RemoveBlockRecord removes what WriteBlockRecord made, likewise.
func RemoveBlockRecord(file string) error {
	for _, p := range []string{file + newSuffix, file} {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// newSuffix is of a record that is being written.
const newSuffix = ".new"

func writeRecord(file string, r VolumeRecord) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(file+newSuffix, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(file+newSuffix, file)
}

// ReadVolumeRecord reads the record of the volume directory dir; ok is false
// when the directory is an ordinary one.
func ReadVolumeRecord(dir string) (r VolumeRecord, ok bool, err error) {
	return readRecord(filepath.Join(dir, VolumeRecordName))
}

// ReadBlockRecord reads what WriteBlockRecord wrote, through links that lead to
// it; ok is false when the file is not there or is something else, such as a
// device.
func ReadBlockRecord(file string) (r VolumeRecord, ok bool, err error) {
	fi, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !fi.Mode().IsRegular() {
		return r, false, nil
	}
	if err != nil {
		return r, false, err
	}
	return readRecord(file)
}

// maxRecord bounds a record's file, in bytes.
const maxRecord = 64 << 10

func readRecord(file string) (r VolumeRecord, ok bool, err error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return r, false, nil
	}
	if err != nil {
		return r, false, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxRecord))
	if err != nil {
		return r, false, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, false, fmt.Errorf("volume record %s: %w", file, err)
	}
	return r, true, nil
}
