package volumes

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/kubernetes/pkg/volume"
	volumetest "k8s.io/kubernetes/pkg/volume/testing"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
)

func plugin(t *testing.T, usage UsageFunc) volume.VolumePlugin {
	t.Helper()
	mgr := volume.VolumePluginMgr{}
	host := volumetest.NewFakeKubeletVolumeHost(t, t.TempDir(), nil, nil)
	if err := mgr.InitPlugins(Plugins(usage, nil), nil, host); err != nil {
		t.Fatal(err)
	}
	p, err := mgr.FindPluginByName(emptyDirName)
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []*v1.Volume{
		{Name: "h", VolumeSource: v1.VolumeSource{HostPath: &v1.HostPathVolumeSource{}}},
		{Name: "n", VolumeSource: v1.VolumeSource{NFS: &v1.NFSVolumeSource{}}},
		{Name: "c", VolumeSource: v1.VolumeSource{CSI: &v1.CSIVolumeSource{}}},
	} {
		if got, err := mgr.FindPluginBySpec(volume.NewSpecFromVolume(kind)); err == nil {
			t.Errorf("%s is offered", got.GetPluginName())
		}
	}
	return p
}

func spec(name string, medium v1.StorageMedium, limit string) *volume.Spec {
	e := &v1.EmptyDirVolumeSource{Medium: medium}
	if limit != "" {
		q := resource.MustParse(limit)
		e.SizeLimit = &q
	}
	return volume.NewSpecFromVolume(&v1.Volume{Name: name, VolumeSource: v1.VolumeSource{EmptyDir: e}})
}

func podWithLimit(limit string) *v1.Pod {
	p := &v1.Pod{Spec: v1.PodSpec{Containers: []v1.Container{{Name: "c"}}}}
	p.UID = "11111111-2222-3333-4444-555555555555"
	if limit != "" {
		p.Spec.Containers[0].Resources.Limits = v1.ResourceList{v1.ResourceMemory: resource.MustParse(limit)}
	}
	return p
}

func TestRecords(t *testing.T) {
	p := plugin(t, nil)
	group := int64(2000)
	tests := []struct {
		name        string
		medium      v1.StorageMedium
		limit       string
		podLimit    string
		want        vmpod.VolumeRecord
		unsupported bool
	}{
		{"disk", "", "", "", vmpod.VolumeRecord{Kind: "emptyDir"}, false},
		{"disk with a limit", "", "1Mi", "64Mi", vmpod.VolumeRecord{Kind: "emptyDir", SizeLimit: 1 << 20}, false},
		{"memory", v1.StorageMediumMemory, "", "", vmpod.VolumeRecord{Kind: "emptyDir", Medium: "Memory"}, false},
		{"memory within the pod's", v1.StorageMediumMemory, "1Gi", "64Mi", vmpod.VolumeRecord{Kind: "emptyDir", Medium: "Memory", SizeLimit: 64 << 20}, false},
		{"memory below the pod's", v1.StorageMediumMemory, "16Mi", "64Mi", vmpod.VolumeRecord{Kind: "emptyDir", Medium: "Memory", SizeLimit: 16 << 20}, false},
		{"huge pages", "HugePages", "", "", vmpod.VolumeRecord{}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m, err := p.NewMounter(spec("data", tt.medium, tt.limit), podWithLimit(tt.podLimit))
			if tt.unsupported {
				if err == nil {
					t.Fatal("offered")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for range 2 { // SetUp is idempotent
				if err := m.SetUp(volume.MounterArgs{FsGroup: &group}); err != nil {
					t.Fatal(err)
				}
			}
			r, ok, err := vmpod.ReadVolumeRecord(m.GetPath())
			if !ok || err != nil || r.FSGroup == nil || *r.FSGroup != group {
				t.Fatalf("record = %+v, %v, %v", r, ok, err)
			}
			r.FSGroup = nil
			if r != tt.want {
				t.Errorf("record = %+v, want %+v", r, tt.want)
			}
			u, err := p.NewUnmounter("data", podWithLimit("").UID)
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := u.TearDown(); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := os.Stat(m.GetPath()); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("left behind: %v", err)
			}
		})
	}
}

func TestMetricsComeFromTheGuest(t *testing.T) {
	var asked string
	p := plugin(t, func(_ context.Context, uid, dir string) (storage.Usage, error) {
		asked = uid + " " + filepath.Base(dir)
		return storage.Usage{Bytes: 123, CapacityBytes: 1000, AvailableBytes: 877, Inodes: 4, InodesCapacity: 90, InodesFree: 86}, nil
	})
	m, err := p.NewMounter(spec("data", "", "1Mi"), podWithLimit(""))
	if err != nil {
		t.Fatal(err)
	}
	got, err := m.GetMetrics()
	if err != nil || got.Used.Value() != 123 || got.InodesUsed.Value() != 4 || got.Inodes.Value() != 90 || got.InodesFree.Value() != 86 || got.Time.IsZero() {
		t.Fatalf("GetMetrics = %+v, %v", got, err)
	}
	if asked != "11111111-2222-3333-4444-555555555555 data" {
		t.Errorf("asked for %q", asked)
	}
}

func TestWrappedVolumesStayOnTheHost(t *testing.T) {
	p := plugin(t, nil)
	m, err := p.NewMounter(spec("wrapped_token", "", ""), podWithLimit(""))
	if err != nil {
		t.Fatal(err)
	}
	if _, ours := m.(*emptyDir); ours {
		t.Error("a wrapped volume got a record")
	}
	if u, err := p.NewUnmounter("wrapped_token", types.UID("x")); err != nil {
		t.Error(err)
	} else if _, ours := u.(*emptyDir); ours {
		t.Error("a wrapped volume is torn down as the guest's")
	}
}

func TestTearDownErasesNothingElse(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := (&emptyDir{}).TearDownAt(dir); err == nil {
		t.Error("a directory with a stranger in it was torn down")
	}
}

// Secrets are on no disk of the host: what upstream's plug-ins write lies on a
// tmpfs, although the plug-in that mounts it for them has been replaced.
func TestSecretsLieOnATmpfs(t *testing.T) {
	pod := podWithLimit("")
	pod.Name, pod.Namespace = "p", "ns"
	secret := &v1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s", Namespace: "ns"}, Data: map[string][]byte{"key": []byte("x")}}
	for name, source := range map[string]v1.VolumeSource{
		"secret": {Secret: &v1.SecretVolumeSource{SecretName: "s"}},
		"projected": {Projected: &v1.ProjectedVolumeSource{Sources: []v1.VolumeProjection{
			{Secret: &v1.SecretProjection{LocalObjectReference: v1.LocalObjectReference{Name: "s"}}},
		}}},
	} {
		t.Run(name, func(t *testing.T) {
			host := volumetest.NewFakeKubeletVolumeHost(t, t.TempDir(), fake.NewClientset(secret), Plugins(nil, nil))
			mode := int32(0o400)
			if source.Secret != nil {
				source.Secret.DefaultMode = &mode
			} else {
				source.Projected.DefaultMode = &mode
			}
			spec := volume.NewSpecFromVolume(&v1.Volume{Name: "v", VolumeSource: source})
			p, err := host.GetPluginMgr().FindPluginBySpec(spec)
			if err != nil {
				t.Fatal(err)
			}
			m, err := p.NewMounter(spec, pod)
			if err != nil {
				t.Fatal(err)
			}
			if err := m.SetUp(volume.MounterArgs{}); err != nil {
				t.Fatal(err)
			}
			if b, err := os.ReadFile(filepath.Join(m.GetPath(), "key")); err != nil || string(b) != "x" {
				t.Fatalf("the Secret's file: %q, %v", b, err)
			}
			mounts, err := host.GetMounter().List()
			if err != nil || len(mounts) != 1 || mounts[0].Type != "tmpfs" || mounts[0].Path != m.GetPath() {
				t.Errorf("mounts: %+v, %v; want a tmpfs at %s", mounts, err, m.GetPath())
			}
		})
	}
}
