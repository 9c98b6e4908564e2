package vmpod

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// VolumeRecordName is the file by which a host directory that the kubelet
// believes to be a mounted volume says what the guest must make instead.
// Prior art: mountInfo.json of Kata's pkg/direct-volume.
const VolumeRecordName = ".atoll-volume.json"

// A VolumeRecord stands in a volume's host directory for a volume that lives
// in the guest alone.
type VolumeRecord struct {
	// Kind is "emptyDir".
	Kind string `json:"kind"`
	// Medium is "" (the pod's ephemeral disk) or "Memory" (a tmpfs).
	Medium string `json:"medium,omitempty"`
	// SizeLimit is in bytes, 0 for none. For memory it is the tmpfs's size. On
	// the disk the kubelet evicts the pod whose volume has exceeded it; a guest
	// with quotas lets the volume exceed it by 1 MiB at most.
	SizeLimit int64 `json:"sizeLimit,omitempty"`
	// FSGroup owns the volume's root directory (mode 2777), if set.
	FSGroup *int64 `json:"fsGroup,omitempty"`
}

// WriteVolumeRecord puts the record into the volume directory dir.
func WriteVolumeRecord(dir string, r VolumeRecord) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, VolumeRecordName), b, 0o600)
}

// ReadVolumeRecord reads the record of the volume directory dir; ok is false
// when the directory is an ordinary one.
func ReadVolumeRecord(dir string) (r VolumeRecord, ok bool, err error) {
	b, err := os.ReadFile(filepath.Join(dir, VolumeRecordName))
	if errors.Is(err, fs.ErrNotExist) {
		return r, false, nil
	}
	if err != nil {
		return r, false, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, false, fmt.Errorf("volume record %s: %w", filepath.Join(dir, VolumeRecordName), err)
	}
	return r, true, nil
}
