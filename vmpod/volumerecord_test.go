package vmpod

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/containerd/errdefs"
)

func TestDiskRecordCheck(t *testing.T) {
	ok := func(d DiskRecord) DiskRecord { d.VolumeID = "v1"; return d }
	for name, tt := range map[string]struct {
		record DiskRecord
		good   bool
	}{
		"plain":              {ok(DiskRecord{}), true},
		"xfs with options":   {ok(DiskRecord{FSType: "xfs", Options: []string{"noatime", "discard"}}), true},
		"raw":                {ok(DiskRecord{Block: true}), true},
		"no name":            {DiskRecord{}, false},
		"btrfs":              {ok(DiskRecord{FSType: "btrfs"}), false},
		"raw with ext4":      {ok(DiskRecord{Block: true, FSType: "ext4"}), false},
		"raw with options":   {ok(DiskRecord{Block: true, Options: []string{"ro"}}), false},
		"unknown policy":     {ok(DiskRecord{FSGroupChangePolicy: "Never"}), false},
		"no barriers":        {ok(DiskRecord{Options: []string{"nobarrier"}}), false},
		"two in one":         {ok(DiskRecord{Options: []string{"noatime,nobarrier"}}), false},
		"another superblock": {ok(DiskRecord{Options: []string{"sb=131072"}}), false},
	} {
		if err := tt.record.Check(); (err == nil) != tt.good || err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBlockRecord(t *testing.T) {
	dir := t.TempDir()
	file, link := filepath.Join(dir, "publish"), filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := ReadBlockRecord(link); ok || err != nil {
		t.Fatalf("a record that is not there: %t, %v", ok, err)
	}
	want := VolumeRecord{Kind: VolumeDisk, Disk: &DiskRecord{VolumeID: "v1", Block: true}}
	for range 2 { // published again
		if err := WriteBlockRecord(file, want); err != nil {
			t.Fatal(err)
		}
	}
	got, ok, err := ReadBlockRecord(link)
	if err != nil || !ok || !reflect.DeepEqual(got, want) {
		t.Fatalf("read %+v, %t, %v", got, ok, err)
	}
	if _, ok, err := ReadBlockRecord("/dev/null"); ok || err != nil {
		t.Errorf("a device: %t, %v", ok, err)
	}
	// As a crash would leave it.
	if err := os.WriteFile(file+newSuffix, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := RemoveBlockRecord(file); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 { // the link
		t.Errorf("left: %v, %v", left, err)
	}
}
