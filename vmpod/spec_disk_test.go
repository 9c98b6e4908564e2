package vmpod_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/openatoll/atoll/vmpod"
)

func TestDiskEqual(t *testing.T) {
	volume := func(change func(*vmpod.Volume)) vmpod.Disk {
		v := &vmpod.Volume{ID: "ds.v", Backing: []vmpod.DiskFile{{Path: "/a", Format: "raw"}}, IOPS: 100, BytesPerSecond: 1 << 20, Key: []byte("sixteen bytes...")}
		change(v)
		return vmpod.Disk{ID: "v-1", Path: "/v", Format: "qcow2", Volume: v}
	}
	same := func(*vmpod.Volume) {}
	for name, c := range map[string]struct {
		a, b  vmpod.Disk
		equal bool
	}{
		"other pointers": {volume(same), volume(same), true},
		"another key":    {volume(same), volume(func(v *vmpod.Volume) { v.Key = nil }), true},
		"another limit":  {volume(same), volume(func(v *vmpod.Volume) { v.IOPS++ }), false},
		"another layer":  {volume(same), volume(func(v *vmpod.Volume) { v.Backing[0].Path = "/b" }), false},
		"another volume": {volume(same), volume(func(v *vmpod.Volume) { v.ID = "ds.w" }), false},
		"no volume":      {volume(same), vmpod.Disk{ID: "v-1", Path: "/v", Format: "qcow2"}, false},
		"plain":          {vmpod.Disk{ID: "a", Path: "/a"}, vmpod.Disk{ID: "a", Path: "/a"}, true},
	} {
		if got := c.a.Equal(c.b); got != c.equal {
			t.Errorf("%s: Equal = %v", name, got)
		}
	}
	if b, err := json.Marshal(volume(same)); err != nil || strings.Contains(string(b), "ixteen") || strings.Contains(string(b), "c2l4dGVlbi") {
		t.Errorf("a record shows the key: %s, %v", b, err)
	}
}
