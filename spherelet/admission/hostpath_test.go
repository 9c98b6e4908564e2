package admission

import (
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"

	"github.com/openatoll/atoll/vmpod"
)

func TestHostPath(t *testing.T) {
	host := Host{HostDirectories: []vmpod.HostDirectory{{Path: "/srv/data"}, {Path: "/var/log", ReadOnly: true}}}
	mounted := func(path string, kind v1.HostPathType, change func(*v1.VolumeMount)) func(*v1.Pod) {
		return func(p *v1.Pod) {
			volume(v1.VolumeSource{HostPath: &v1.HostPathVolumeSource{Path: path, Type: &kind}})(p)
			m := v1.VolumeMount{Name: "v", MountPath: "/v"}
			if change != nil {
				change(&m)
			}
			p.Spec.Containers[0].VolumeMounts = []v1.VolumeMount{m}
		}
	}
	readOnly := func(m *v1.VolumeMount) { m.ReadOnly = true }
	const vol, mount = "spec.volumes[6](v).hostPath", "spec.containers[0].volumeMounts[0](v)"
	for _, tt := range []struct {
		name   string
		change func(*v1.Pod)
		field  string // "" when admitted
		says   string
	}{
		{"the directory", mounted("/srv/data", "", nil), "", ""},
		{"below it, with a slash", mounted("/srv/data/a/", v1.HostPathDirectoryOrCreate, nil), "", ""},
		{"a file", mounted("/srv/data/a", v1.HostPathFile, nil), "", ""},
		{"to be read", mounted("/var/log/pods", v1.HostPathDirectory, readOnly), "", ""},
		{"written where it may be read", mounted("/var/log/pods", "", nil), mount + ".readOnly", "readOnly: true"},
		{"outside", mounted("/etc", "", nil), vol, "hostDirectories"},
		{"beside, with the same beginning", mounted("/srv/database", "", nil), vol, "/srv/data, /var/log"},
		{"a socket", mounted("/srv/data/s", v1.HostPathSocket, nil), vol + ".type", "Socket"},
		{"a sub-path", mounted("/srv/data", "", func(m *v1.VolumeMount) { m.SubPath = "a" }), mount + ".subPath", "hostPath.path"},
		{"mounts from the node", mounted("/srv/data", "", func(m *v1.VolumeMount) { m.MountPropagation = ptr(v1.MountPropagationHostToContainer) }), "", ""},
		{"mounts from the pod", mounted("/srv/data", "", func(m *v1.VolumeMount) { m.MountPropagation = ptr(v1.MountPropagationBidirectional) }), mount + ".mountPropagation", "HostToContainer"},
		{"mounts that could be written", mounted("/var/log", "", func(m *v1.VolumeMount) {
			m.ReadOnly, m.MountPropagation = true, ptr(v1.MountPropagationHostToContainer)
		}), mount + ".mountPropagation", "leave it out"},
		{"mapped users", func(p *v1.Pod) {
			mounted("/srv/data", "", nil)(p)
			p.Spec.HostUsers = ptr(false)
		}, vol, "leave one of the two out"},
	} {
		p := basic()
		tt.change(p)
		h := host
		h.UserNamespaces = true
		rs := Check(p, h)
		if tt.field == "" {
			if len(rs) > 0 {
				t.Errorf("%s: refused: %v", tt.name, rs)
			}
			continue
		}
		if len(rs) != 1 || rs[0].Field != tt.field || rs[0].Reason != ReasonVolume || !strings.Contains(rs[0].String(), tt.says) {
			t.Errorf("%s: got %v, want a refusal of %s that says %q", tt.name, rs, tt.field, tt.says)
		}
	}
	p := basic()
	mounted("/srv/data", "", nil)(p)
	if rs := Check(p, Host{}); len(rs) != 1 || !strings.Contains(rs[0].Instead, "hostDirectories of the node's configuration") {
		t.Errorf("without the configuration: %v, want the key named", rs)
	}
}
