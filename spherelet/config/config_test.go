package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

const head = "apiVersion: atoll.dev/v1alpha1\nkind: SphereletConfiguration\n"
const minimal = head + "dataDir: /var/lib/atoll\nclientCAFile: /etc/ca.crt\nhypervisor:\n  guest: /usr/lib/atoll/guest\nclusterCIDR: 198.19.0.0/16\n"

func TestDefaults(t *testing.T) {
	c, err := Parse([]byte(minimal + "nodeName: a\n"))
	if err != nil {
		t.Fatal(err)
	}
	if c.Port != 10250 || c.HealthPort != 10248 || c.MaxPods != 250 || c.ClusterDomain != "cluster.local" ||
		!*c.KubeProxy || c.Hypervisor.Accelerator != "auto" || c.Hypervisor.EphemeralDefault != "10Gi" ||
		c.Images.MaxConcurrentDownloads != 3 || c.LogLevel != "info" || c.Kubeconfig != "/var/lib/atoll/kubeconfig" {
		t.Errorf("defaults: %+v", c)
	}
	if c.RunDir != RunDir("/var/lib/atoll/") || len(c.RunDir) != len("/run/atoll/")+8 {
		t.Errorf("runDir = %q", c.RunDir)
	}
}

func TestParseErrors(t *testing.T) {
	tests := []struct{ name, yaml, want string }{
		{"unknown key", minimal + "nodeNmae: x\n", `"nodeNmae"`},
		{"unknown nested key", strings.Replace(minimal, "guest:", "gest:", 1), `"gest"`},
		{"duplicate key", minimal + "port: 1\nport: 2\n", `"port"`},
		{"wrong kind", "apiVersion: atoll.dev/v1alpha1\nkind: Pod\n", `kind is "Pod", must be "SphereletConfiguration"`},
		{"wrong version", "apiVersion: v1\nkind: SphereletConfiguration\n", `apiVersion is "v1", must be "atoll.dev/v1alpha1"`},
		{"no YAML", "\tx", "is not YAML"},
		{"wrong type", minimal + "port: many\n", "port"},
		{"no data directory", head + "clientCAFile: /a\n", `dataDir is ""`},
		{"relative path", minimal + "bootstrapKubeconfig: x\n", `bootstrapKubeconfig is "x", must be an absolute path`},
		{"localhost", minimal + "nodeName: localhost\n", "unique in the cluster"},
		{"node IP", minimal + "nodeIP: 127.0.0.1\n", `nodeIP is "127.0.0.1"`},
		{"port", minimal + "port: 70000\n", "port is 70000, must be 1 to 65535"},
		{"same ports", minimal + "port: 9\nhealthPort: 9\n", "must differ"},
		{"pods", minimal + "maxPods: 1001\n", "maxPods is 1001, must be 1 to 1000"},
		{"reserved", minimal + "kubeReserved:\n  memory: lots\n", `kubeReserved[memory] is "lots"`},
		{"label", minimal + "labels:\n  node-role.kubernetes.io/x: \"\"\n", "may not set this label on itself"},
		{"own label", minimal + "labels:\n  atoll.dev/kvm: usable\n", "may not set this label on itself"},
		{"taint", minimal + "taints: [\"a=b\"]\n", `taints[0] is "a=b"`},
		{"verbosity", minimal + "kubeletVerbosity: 9\n", "bodies of Secrets"},
		{"accelerator", strings.Replace(minimal, "  guest:", "  accelerator: xen\n  guest:", 1), `accelerator is "xen"`},
		{"template memory", minimal + "\ntemplates: {memory: 1Mi}\n", `templates.memory is "1Mi"`},
		{"warm clones", minimal + "\ntemplates: {warm: -1}\n", "templates.warm is -1, must be 0 to 64"},
		{"unpacked size", minimal + "\nimages: {maxUnpackedSize: 1Ki}\n", "at least 64Mi"},
		{"image GC", minimal + "\nimages: {gcHighThresholdPercent: 80}\n", "gcHighThresholdPercent is 80 and images.gcLowThresholdPercent 80"},
		{"image GC above all", minimal + "\nimages: {gcHighThresholdPercent: 101}\n", "gcHighThresholdPercent is 101"},
		{"collector", minimal + "\ntracing: {endpoint: collector}\n", `tracing.endpoint is "collector", must be host:port`},
		{"sampling", minimal + "\ntracing: {samplingRatePerMillion: 1000001}\n", "must be 0 to 1000000"},
		{"ephemeral", strings.Replace(minimal, "  guest:", "  ephemeralDefault: 1Ki\n  guest:", 1), "at least 64Mi"},
		{"CIDR", strings.Replace(minimal, "198.19.0.0/16", "ten", 1), `clusterCIDR is "ten"`},
		{"no CIDR", strings.Replace(minimal, "198.19.0.0/16", "\"\"", 1), "kubeProxy: false"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "c.yaml")
			if err := os.WriteFile(file, []byte(tt.yaml), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := Load(file)
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), file) {
				t.Fatalf("Load = %v, want %q and the file's name", err, tt.want)
			}
			if !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Errorf("class of %v", err)
			}
		})
	}
	if _, err := Load("/nonexistent/x"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestDurations(t *testing.T) {
	for _, v := range []string{"", "5m", "1s"} {
		if err := validDuration("images.progressTimeout", v); err != nil {
			t.Errorf("%q: %v", v, err)
		}
	}
	for _, v := range []string{"5", "soon", "-1m", "10ms"} {
		if err := validDuration("images.progressTimeout", v); err == nil || !strings.Contains(err.Error(), "images.progressTimeout") {
			t.Errorf("%q: %v", v, err)
		}
	}
}

func TestLabelsAllowed(t *testing.T) {
	y := minimal + "nodeName: a\nlabels:\n  example.com/x: y\n  node.kubernetes.io/exclude: \"true\"\n  topology.kubernetes.io/zone: z\ntaints: [\"a=b:NoSchedule\", \"c:NoExecute\"]\n"
	if _, err := Parse([]byte(y)); err != nil {
		t.Error(err)
	}
}

func TestPrepare(t *testing.T) {
	c, err := Parse([]byte(strings.Replace(minimal, "/var/lib/atoll", t.TempDir(), 1) + "nodeName: a\nrunDir: " + shortDir(t) + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := Prepare(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Prepare(c); err != nil {
		t.Errorf("a second time: %v", err)
	}
	if err := os.WriteFile(p.Version, []byte("99\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Prepare(c)
	if !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "99") {
		t.Errorf("a newer data directory: %v", err)
	}
	if b, _ := os.ReadFile(p.Version); string(b) != "99\n" {
		t.Error("the newer version was overwritten")
	}
}

func TestLongDataDir(t *testing.T) {
	long := filepath.Join(t.TempDir(), strings.Repeat("x", 100))
	c, err := Parse([]byte(strings.Replace(minimal, "/var/lib/atoll", long, 1) + "nodeName: a\nrunDir: " + shortDir(t) + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		p, err := Prepare(c)
		if err != nil {
			t.Fatal(err)
		}
		if len(p.Kubelet)+max(len(podResourcesSocketBelow), len(RegistrationSocketBelow)) > socketPathMax {
			t.Errorf("kubelet root %s is too long for its sockets", p.Kubelet)
		}
		if real, err := filepath.EvalSymlinks(p.Kubelet); err != nil || real != p.KubeletReal {
			t.Errorf("%s leads to %s, %v", p.Kubelet, real, err)
		}
	}
}

func shortDir(t *testing.T) string {
	d, err := os.MkdirTemp("/tmp", "sph")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(d) })
	return d
}

func TestRuntimeNeedsNoCluster(t *testing.T) {
	const text = "apiVersion: atoll.dev/v1alpha1\nkind: SphereletConfiguration\nnodeName: a\ndataDir: /d\nhypervisor: {guest: /g}\n"
	if _, err := Parse([]byte(text)); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "clientCAFile") || !strings.Contains(err.Error(), "clusterCIDR") {
		t.Errorf("a node: %v", err)
	}
	if _, err := parseRuntime([]byte(text)); err != nil {
		t.Errorf("a runtime: %v", err)
	}
	if _, err := parseRuntime([]byte(text + "nodeIP: here\n")); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a runtime with a bad address: %v", err)
	}
}
