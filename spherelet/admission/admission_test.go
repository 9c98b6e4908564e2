package admission

import (
	"fmt"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/openatoll/atoll/api/v1alpha1"
)

func ptr[T any](v T) *T { return &v }

func basic() *v1.Pod {
	return &v1.Pod{Spec: v1.PodSpec{
		Containers: []v1.Container{{Name: "a", Image: "x"}},
		Volumes: []v1.Volume{
			{Name: "e", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{}}},
			{Name: "m", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{Medium: "Memory"}}},
			{Name: "c", VolumeSource: v1.VolumeSource{ConfigMap: &v1.ConfigMapVolumeSource{}}},
			{Name: "s", VolumeSource: v1.VolumeSource{Secret: &v1.SecretVolumeSource{}}},
			{Name: "p", VolumeSource: v1.VolumeSource{Projected: &v1.ProjectedVolumeSource{}}},
			{Name: "d", VolumeSource: v1.VolumeSource{DownwardAPI: &v1.DownwardAPIVolumeSource{}}},
		},
	}}
}

func volume(s v1.VolumeSource) func(*v1.Pod) {
	return func(p *v1.Pod) { p.Spec.Volumes = append(p.Spec.Volumes, v1.Volume{Name: "v", VolumeSource: s}) }
}

func requests(name, q string) func(*v1.Pod) {
	return func(p *v1.Pod) {
		p.Spec.Containers[0].Resources.Requests = v1.ResourceList{v1.ResourceName(name): resource.MustParse(q)}
	}
}

func TestCheck(t *testing.T) {
	host := Host{CPUs: 2, Memory: 4 << 30, Disk: 100 << 30, ImageDisks: 3,
		ExtendedResource: func(n string) bool { return n == "example.com/licence" }}
	tests := []struct {
		name   string
		change func(*v1.Pod)
		field  string // "" when admitted
		reason string
	}{
		{"plain", func(*v1.Pod) {}, "", ""},
		{"hostNetwork", func(p *v1.Pod) { p.Spec.HostNetwork = true }, "spec.hostNetwork", ReasonHostNamespace},
		{"hostPID", func(p *v1.Pod) { p.Spec.HostPID = true }, "spec.hostPID", ReasonHostNamespace},
		{"hostIPC", func(p *v1.Pod) { p.Spec.HostIPC = true }, "spec.hostIPC", ReasonHostNamespace},
		{"hostUsers false", func(p *v1.Pod) { p.Spec.HostUsers = ptr(false) }, "spec.hostUsers", ReasonUserNamespace},
		{"hostUsers true", func(p *v1.Pod) { p.Spec.HostUsers = ptr(true) }, "", ""},
		{"windows", func(p *v1.Pod) { p.Spec.OS = &v1.PodOS{Name: v1.Windows} }, "spec.os.name", ReasonWindows},
		{"windows options", func(p *v1.Pod) {
			p.Spec.SecurityContext = &v1.PodSecurityContext{WindowsOptions: &v1.WindowsSecurityContextOptions{}}
		}, "spec.securityContext.windowsOptions", ReasonWindows},
		{"hostPath", volume(v1.VolumeSource{HostPath: &v1.HostPathVolumeSource{Path: "/"}}), "spec.volumes[6](v).hostPath", ReasonVolume},
		{"nfs", volume(v1.VolumeSource{NFS: &v1.NFSVolumeSource{}}), "spec.volumes[6](v).nfs", ReasonVolume},
		{"iscsi", volume(v1.VolumeSource{ISCSI: &v1.ISCSIVolumeSource{}}), "spec.volumes[6](v).iscsi", ReasonVolume},
		{"gitRepo", volume(v1.VolumeSource{GitRepo: &v1.GitRepoVolumeSource{}}), "spec.volumes[6](v).gitRepo", ReasonVolume},
		{"flexVolume", volume(v1.VolumeSource{FlexVolume: &v1.FlexVolumeSource{}}), "spec.volumes[6](v).flexVolume", ReasonVolume},
		{"inline csi", volume(v1.VolumeSource{CSI: &v1.CSIVolumeSource{}}), "spec.volumes[6](v).csi", ReasonVolume},
		{"claim", volume(v1.VolumeSource{PersistentVolumeClaim: &v1.PersistentVolumeClaimVolumeSource{}}), "spec.volumes[6](v).persistentVolumeClaim", ReasonVolume},
		{"generic ephemeral", volume(v1.VolumeSource{Ephemeral: &v1.EphemeralVolumeSource{}}), "spec.volumes[6](v).ephemeral", ReasonVolume},
		{"image volume", volume(v1.VolumeSource{Image: &v1.ImageVolumeSource{Reference: "y"}}), "spec.volumes[6](v).image", ReasonVolume},
		{"huge page medium", volume(v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{Medium: "HugePages-2Mi"}}), "spec.volumes[6](v).emptyDir.medium", ReasonHugePages},
		{"resource claim", func(p *v1.Pod) { p.Spec.ResourceClaims = []v1.PodResourceClaim{{Name: "gpu"}} }, "spec.resourceClaims[0](gpu)", ReasonResourceClaim},
		{"block device", func(p *v1.Pod) {
			p.Spec.Containers[0].VolumeDevices = []v1.VolumeDevice{{Name: "v", DevicePath: "/dev/x"}}
		}, "spec.containers[0].volumeDevices[0](v)", ReasonBlockDevice},
		{"init container too", func(p *v1.Pod) {
			p.Spec.InitContainers = []v1.Container{{Name: "i", Image: "x", VolumeDevices: []v1.VolumeDevice{{Name: "v"}}}}
		}, "spec.initContainers[0].volumeDevices[0](v)", ReasonBlockDevice},
		{"device plug-in", requests("nvidia.com/gpu", "1"), "spec.containers[0].resources.requests[nvidia.com/gpu]", ReasonExtendedResource},
		{"opaque counter on the node", requests("example.com/licence", "1"), "", ""},
		{"huge pages", requests("hugepages-2Mi", "4Mi"), "spec.containers[0].resources.requests[hugepages-2Mi]", ReasonHugePages},
		{"AppArmor runtime default", func(p *v1.Pod) {
			p.Spec.SecurityContext = &v1.PodSecurityContext{AppArmorProfile: &v1.AppArmorProfile{Type: v1.AppArmorProfileTypeRuntimeDefault}}
		}, "spec.securityContext.appArmorProfile", ReasonAppArmor},
		{"AppArmor local", func(p *v1.Pod) {
			p.Spec.Containers[0].SecurityContext = &v1.SecurityContext{AppArmorProfile: &v1.AppArmorProfile{Type: v1.AppArmorProfileTypeLocalhost}}
		}, "spec.containers[0].securityContext.appArmorProfile", ReasonAppArmor},
		{"AppArmor unconfined", func(p *v1.Pod) {
			p.Spec.SecurityContext = &v1.PodSecurityContext{AppArmorProfile: &v1.AppArmorProfile{Type: v1.AppArmorProfileTypeUnconfined}}
		}, "", ""},
		{"AppArmor annotation", func(p *v1.Pod) { p.Annotations = map[string]string{deprecatedAppArmorKey + "a": "localhost/x"} },
			"metadata.annotations[" + deprecatedAppArmorKey + "a]", ReasonAppArmor},
		{"three images", func(p *v1.Pod) {
			p.Spec.Containers = append(p.Spec.Containers, v1.Container{Image: "y"}, v1.Container{Image: "z"}, v1.Container{Image: "x"})
		}, "", ""},
		{"four images", func(p *v1.Pod) {
			p.Spec.Containers = append(p.Spec.Containers, v1.Container{Image: "y"}, v1.Container{Image: "z"}, v1.Container{Image: "w"})
		}, "spec.containers[*].image", ReasonTooManyDisks},
		{"CPU request beyond the host", requests("cpu", "3"), "spec.containers[*].resources.requests.cpu", ReasonTooLarge},
		{"memory request beyond the host", requests("memory", "5Gi"), "spec.containers[*].resources.requests.memory", ReasonTooLarge},
		{"disk request beyond the host", requests("ephemeral-storage", "1Ti"), "spec.containers[*].resources.requests.ephemeral-storage", ReasonTooLarge},
		{"limit beyond the host", func(p *v1.Pod) {
			p.Spec.Containers[0].Resources.Limits = v1.ResourceList{"memory": resource.MustParse("1Ti")}
		}, "", ""},
		{"privileged and hostPort are fine", func(p *v1.Pod) {
			p.Spec.Containers[0].SecurityContext = &v1.SecurityContext{Privileged: ptr(true)}
			p.Spec.Containers[0].Ports = []v1.ContainerPort{{HostPort: 80}}
		}, "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := basic()
			tt.change(p)
			before := p.DeepCopy()
			rs := Check(p, host)
			if tt.field == "" {
				if len(rs) != 0 {
					t.Fatalf("refused: %v", rs)
				}
				return
			}
			if len(rs) != 1 || rs[0].Field != tt.field || rs[0].Reason != tt.reason {
				t.Fatalf("Check = %+v, want one refusal of %s (%s)", rs, tt.field, tt.reason)
			}
			reason, message := Explain(rs)
			if reason != tt.reason || !strings.Contains(message, tt.field) || rs[0].Why == "" || rs[0].Instead == "" {
				t.Errorf("Explain = %q, %q", reason, message)
			}
			if before.String() != p.String() {
				t.Error("Check changed the pod")
			}
		})
	}
}

func TestExplainSeveral(t *testing.T) {
	p := basic()
	p.Spec.HostPID, p.Spec.HostNetwork = true, true
	reason, message := Explain(Check(p, Host{}))
	if reason != ReasonHostNamespace || !strings.Contains(message, "hostPID") || !strings.Contains(message, "hostNetwork") {
		t.Errorf("Explain = %q, %q", reason, message)
	}
	for i := range 60 {
		p.Spec.ResourceClaims = append(p.Spec.ResourceClaims, v1.PodResourceClaim{Name: fmt.Sprint(i)})
	}
	if _, message = Explain(Check(p, Host{})); len(message) > maxMessage+30 || !strings.Contains(message, "more)") {
		t.Errorf("message of %d bytes: %s", len(message), message)
	}
}

func TestNotices(t *testing.T) {
	p := basic()
	if n := Notices(p); len(n) != 0 {
		t.Errorf("Notices of a plain pod: %v", n)
	}
	p.Spec.Containers[0].SecurityContext = &v1.SecurityContext{SELinuxOptions: &v1.SELinuxOptions{Level: "s0"}}
	if n := Notices(p); len(n) != 1 || n[0].Field != "spec.containers[0].securityContext.seLinuxOptions" {
		t.Errorf("Notices = %v", n)
	}
}

// What a node offers is not refused.
func TestOffered(t *testing.T) {
	p := basic()
	p.Spec.HostUsers = ptr(false)
	volume(v1.VolumeSource{Image: &v1.ImageVolumeSource{Reference: "y"}})(p)
	if rs := Check(p, Host{UserNamespaces: true, ImageVolumes: true}); len(rs) != 0 {
		t.Errorf("refused: %v", rs)
	}
	if rs := Check(p, Host{UserNamespaces: true, ImageVolumes: true, ImageDisks: 1}); len(rs) != 1 || rs[0].Reason != ReasonTooManyDisks {
		t.Errorf("an image as a volume is a disk, too: %v", rs)
	}
}

// Volumes that a node's own driver has; others of CSI stay refused.
func TestPersistentVolumes(t *testing.T) {
	inline := func(driver string) v1.Volume {
		return v1.Volume{Name: "v", VolumeSource: v1.VolumeSource{CSI: &v1.CSIVolumeSource{Driver: driver}}}
	}
	p := basic()
	p.Spec.Volumes = []v1.Volume{
		{Name: "c", VolumeSource: v1.VolumeSource{PersistentVolumeClaim: &v1.PersistentVolumeClaimVolumeSource{ClaimName: "c"}}},
		{Name: "e", VolumeSource: v1.VolumeSource{Ephemeral: &v1.EphemeralVolumeSource{}}},
		inline(v1alpha1.CSIDriverName),
	}
	p.Spec.Containers[0].VolumeDevices = []v1.VolumeDevice{{Name: "c", DevicePath: "/dev/x"}}
	if rs := Check(p, Host{PersistentVolumes: true}); len(rs) > 0 {
		t.Errorf("refused: %v", rs)
	}
	if rs := Check(p, Host{}); len(rs) != 4 {
		t.Errorf("without: %v", rs)
	}
	p.Spec.Volumes = append(p.Spec.Volumes, inline("example.com"))
	if rs := Check(p, Host{PersistentVolumes: true}); len(rs) != 1 || rs[0].Field != "spec.volumes[3](v).csi" {
		t.Errorf("of another driver: %v", rs)
	}
}
