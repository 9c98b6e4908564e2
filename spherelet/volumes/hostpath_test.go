package volumes

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/kubernetes/pkg/volume"
	volumetest "k8s.io/kubernetes/pkg/volume/testing"

	"github.com/openatoll/atoll/vmpod"
)

func TestHostPath(t *testing.T) {
	open, closed, outside := t.TempDir(), t.TempDir(), t.TempDir()
	if err := os.Symlink(outside, filepath.Join(open, "out")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(open, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	dirs := []vmpod.HostDirectory{{Path: open}, {Path: closed, ReadOnly: true}}
	mgr := volume.VolumePluginMgr{}
	if err := mgr.InitPlugins(Plugins(nil, dirs), nil, volumetest.NewFakeKubeletVolumeHost(t, t.TempDir(), fake.NewClientset(), nil)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, path string
		kind       v1.HostPathType
		refused    string
	}{
		{"a directory", open, v1.HostPathDirectory, ""},
		{"made", filepath.Join(open, "a/b"), v1.HostPathDirectoryOrCreate, ""},
		{"made before", filepath.Join(open, "a/b"), v1.HostPathDirectoryOrCreate, ""},
		{"a file made", filepath.Join(open, "a/f"), v1.HostPathFileOrCreate, ""},
		{"not checked", filepath.Join(open, "nothing"), v1.HostPathUnset, ""},
		{"missing", filepath.Join(open, "nothing"), v1.HostPathDirectory, "not there"},
		{"a file as a directory", filepath.Join(open, "file"), v1.HostPathDirectory, "no directory"},
		{"a directory as a file", open, v1.HostPathFile, "no file"},
		{"made where pods only read", filepath.Join(closed, "a"), v1.HostPathDirectoryOrCreate, "only to be read"},
		{"made behind a link", filepath.Join(open, "out/a"), v1.HostPathDirectoryOrCreate, "escapes"},
		{"a file made behind a link", filepath.Join(open, "out/nologin"), v1.HostPathFileOrCreate, "escapes"},
		{"outside", outside, v1.HostPathDirectory, "hostDirectories"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			spec := volume.NewSpecFromVolume(&v1.Volume{Name: "v", VolumeSource: v1.VolumeSource{HostPath: &v1.HostPathVolumeSource{Path: tt.path, Type: &tt.kind}}})
			plugin, err := mgr.FindPluginBySpec(spec)
			if err != nil {
				t.Fatal(err)
			}
			mounter, err := plugin.NewMounter(spec, &v1.Pod{})
			if err == nil {
				err = mounter.SetUp(volume.MounterArgs{})
			}
			if tt.refused == "" && err != nil || tt.refused != "" && (err == nil || !strings.Contains(err.Error(), tt.refused)) {
				t.Fatalf("SetUp = %v, want %q", err, tt.refused)
			}
			if err == nil && mounter.GetPath() != tt.path {
				t.Errorf("the path is %s, want %s", mounter.GetPath(), tt.path)
			}
		})
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("made outside: %v, %v", left, err)
	}
}
