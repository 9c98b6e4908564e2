package cri

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

func TestClassify(t *testing.T) {
	root := t.TempDir()
	pod := filepath.Join(root, "pods", podUID)
	volumes := filepath.Join(pod, "volumes")
	for _, d := range []string{"kubernetes.io~configmap/cfg", "kubernetes.io~empty-dir/plain", "kubernetes.io~empty-dir/mem", "kubernetes.io~empty-dir/odd"} {
		os.MkdirAll(filepath.Join(volumes, d), 0o755)
	}
	os.MkdirAll(filepath.Join(pod, "volume-subpaths/cfg/main/0"), 0o755)
	vmpod.WriteVolumeRecord(filepath.Join(volumes, "kubernetes.io~empty-dir/mem"), vmpod.VolumeRecord{Kind: "emptyDir", Medium: "Memory", SizeLimit: 5})
	vmpod.WriteVolumeRecord(filepath.Join(volumes, "kubernetes.io~empty-dir/odd"), vmpod.VolumeRecord{Kind: "emptyDir", Medium: "HugePages"})
	host := t.TempDir()
	os.WriteFile(filepath.Join(host, "file"), []byte("x"), 0o644)
	os.Symlink("file", filepath.Join(host, "link"))
	l, err := net.Listen("unix", filepath.Join(host, "sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	tree, empty, tmpfs := agentapi.AddVolumeRequest_TREE, agentapi.AddVolumeRequest_EMPTY_DIR, agentapi.AddVolumeRequest_TMPFS
	for _, tc := range []struct {
		name, path  string
		kubelet     bool
		id, sub     string // id with a trailing "*" is a prefix
		kind        agentapi.AddVolumeRequest_Kind
		follow      bool
		termination bool
		refused     string
	}{
		{name: "configmap", path: volumes + "/kubernetes.io~configmap/cfg", id: "configmap-cfg", kind: tree, follow: true},
		{name: "sub-path", path: volumes + "/kubernetes.io~configmap/cfg/a/b", id: "configmap-cfg", sub: "a/b", kind: tree, follow: true},
		{name: "secret", path: volumes + "/kubernetes.io~secret/s", id: "secret-s", kind: tree, follow: true},
		{name: "projected", path: volumes + "/kubernetes.io~projected/p", id: "projected-p", kind: tree, follow: true},
		{name: "downward", path: volumes + "/kubernetes.io~downward-api/d", id: "downward-d", kind: tree, follow: true},
		{name: "emptyDir without a record", path: volumes + "/kubernetes.io~empty-dir/plain", id: "emptydir-plain", kind: empty},
		{name: "emptyDir in memory", path: volumes + "/kubernetes.io~empty-dir/mem", id: "emptydir-mem", kind: tmpfs},
		{name: "emptyDir of an odd medium", path: volumes + "/kubernetes.io~empty-dir/odd", refused: `"Memory"`},
		{name: "csi", path: volumes + "/kubernetes.io~csi/pvc/mount", refused: `volume "pvc" is mounted on the node by its CSI driver`},
		{name: "hosts", path: pod + "/etc-hosts", id: "etc-hosts", sub: "etc-hosts", kind: tree},
		{name: "termination", path: pod + "/containers/main/1a2b", termination: true},
		{name: "stock sub-path of a tree", path: pod + "/volume-subpaths/cfg/main/0", id: "host-*", kind: tree},
		{name: "stock sub-path of an emptyDir", path: pod + "/volume-subpaths/plain/main/0", refused: "lives in the guest"},
		{name: "another pod", path: root + "/pods/other/etc-hosts", refused: "belongs to the kubelet"},
		{name: "kubelet's own", path: root + "/pki/key", refused: "belongs to the kubelet"},
		{name: "pod directory", path: pod + "/plugins", refused: "no volume"},
		{name: "hostPath of a kubelet's pod", path: host, kubelet: true, refused: "instead of hostPath"},
		{name: "directory of another client", path: host, id: "host-*", kind: tree},
		{name: "file of another client", path: host + "/link", id: "host-*", sub: "file", kind: tree},
		{name: "socket", path: host + "/sock", refused: "socket"},
		{name: "missing", path: host + "/missing", refused: "create it first"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v, sub, term, err := classify(mountRules{kubeletRoot: root, podUID: podUID, fromKubelet: tc.kubelet}, &runtimeapi.Mount{HostPath: tc.path})
			if tc.refused != "" {
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tc.refused) {
					t.Fatalf("got %v, want a refusal with %q", err, tc.refused)
				}
				return
			}
			if err != nil || term != tc.termination {
				t.Fatalf("termination %v, %v", term, err)
			}
			if term {
				return
			}
			id, prefix := strings.CutSuffix(tc.id, "*")
			if v.ID != id && !(prefix && strings.HasPrefix(v.ID, id)) || sub != tc.sub || v.Kind != tc.kind || v.Follow != tc.follow {
				t.Fatalf("got %+v, sub-path %q", v, sub)
			}
		})
	}
}

func TestPlanMounts(t *testing.T) {
	host := t.TempDir()
	for name, m := range map[string][]*runtimeapi.Mount{
		"relative destination": {{ContainerPath: "a", HostPath: host}},
		"root":                 {{ContainerPath: "/", HostPath: host}},
		"relative source":      {{ContainerPath: "/a", HostPath: "b"}},
		"twice":                {{ContainerPath: "/a", HostPath: host}, {ContainerPath: "/a/", HostPath: host}},
		"image and path":       {{ContainerPath: "/a", HostPath: host, Image: &runtimeapi.ImageSpec{Image: "y"}}},
		"image at the same":    {{ContainerPath: "/a", HostPath: host}, {ContainerPath: "/a", Image: &runtimeapi.ImageSpec{Image: "y"}}},
	} {
		if _, err := planMounts(mountRules{kubeletRoot: "/var/lib/kubelet", podUID: podUID}, m); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	plan, err := planMounts(mountRules{podUID: podUID}, []*runtimeapi.Mount{{ContainerPath: "/a", HostPath: host}})
	if err != nil || !plan.mounts[0].ReadOnly || !plan.reported[0].Readonly {
		t.Fatalf("a copy must be read-only: %+v, %v", plan, err)
	}
}

func TestPackTreeLimits(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "big"))
	if err != nil {
		t.Fatal(err)
	}
	f.Truncate(maxTree + 1)
	f.Close()
	if _, _, err := packTree(&volume{HostPath: dir}); !errdefs.IsInvalidArgument(err) {
		t.Fatalf("too big: %v", err)
	}
	os.Remove(f.Name())
	syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600)
	if _, _, err := packTree(&volume{HostPath: dir}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "named pipe") {
		t.Fatalf("pipe: %v", err)
	}
}

func TestProcessArgs(t *testing.T) {
	image := ocispec.ImageConfig{Entrypoint: []string{"/entry"}, Cmd: []string{"cmd"}}
	for _, tc := range []struct {
		command, args []string
		image         ocispec.ImageConfig
		want          string
	}{
		{nil, nil, image, "/entry cmd"},
		{nil, []string{"x"}, image, "/entry x"},
		{[]string{"/c"}, nil, image, "/c"},
		{[]string{"/c"}, []string{"x"}, image, "/c x"},
		{nil, nil, ocispec.ImageConfig{Entrypoint: []string{""}, Cmd: []string{"sh"}}, "sh"},
	} {
		got, err := processArgs(&runtimeapi.ContainerConfig{Command: tc.command, Args: tc.args}, tc.image)
		if err != nil || strings.Join(got, " ") != tc.want {
			t.Errorf("%v %v: got %v, %v; want %q", tc.command, tc.args, got, err, tc.want)
		}
	}
	if _, err := processArgs(&runtimeapi.ContainerConfig{}, ocispec.ImageConfig{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no command: %v", err)
	}
}

func spec(t *testing.T, change func(*runtimeapi.ContainerConfig), choice *seccompChoice) *specs.Spec {
	t.Helper()
	c := ctrConfig("main")
	if change != nil {
		change(c)
	}
	s, err := buildSpec(specInput{id: "x", hostname: "web", image: ocispec.ImageConfig{Cmd: []string{"/web"}, Env: []string{"A=1", "PATH=/bin"}}, config: c, user: specs.User{UID: 7, GID: 8}, seccomp: choice})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestBuildSpec(t *testing.T) {
	s := spec(t, func(c *runtimeapi.ContainerConfig) {
		c.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("2")}}
		c.Linux.SecurityContext.NoNewPrivs = true
		c.Linux.SecurityContext.ReadonlyRootfs = true
		c.Linux.SecurityContext.MaskedPaths = []string{"/proc/kcore"}
		c.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"NET_ADMIN"}, DropCapabilities: []string{"CAP_CHOWN"}}
		c.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512, MemoryLimitInBytes: 64 * mib, MemorySwapLimitInBytes: 64 * mib, OomScoreAdj: 900}
		c.Annotations = map[string]string{"run.oci.handler": "evil"}
	}, &seccompChoice{runtimeDefault: true})
	p, l := s.Process, s.Linux
	if p.User.UID != 7 || !p.NoNewPrivileges || p.Cwd != "/" || *p.OOMScoreAdj != 900 {
		t.Errorf("process %+v", p)
	}
	if !slices.Equal(p.Env, []string{"PATH=/bin", "HOSTNAME=web", "A=2"}) {
		t.Errorf("env %q", p.Env)
	}
	if b := p.Capabilities.Bounding; slices.Contains(b, "CAP_CHOWN") || !slices.Contains(b, "CAP_NET_ADMIN") || len(p.Capabilities.Ambient) != 0 {
		t.Errorf("capabilities %v", p.Capabilities)
	}
	if !s.Root.Readonly || !slices.Equal(l.MaskedPaths, []string{"/proc/kcore"}) || len(l.ReadonlyPaths) != 0 { // as procMount Unmasked sends none
		t.Errorf("root %v, masked %v, read-only %v", s.Root, l.MaskedPaths, l.ReadonlyPaths)
	}
	r := l.Resources
	if *r.CPU.Quota != 50000 || *r.CPU.Shares != 512 || *r.Memory.Limit != 64*mib || r.Memory.Swap != nil || r.Unified["memory.oom.group"] != "1" {
		t.Errorf("resources %+v", r)
	}
	if l.Seccomp == nil || len(s.Annotations) != 0 || len(l.Devices) != 0 {
		t.Errorf("seccomp %v, annotations %v, devices %v", l.Seccomp != nil, s.Annotations, l.Devices)
	}
	for _, n := range l.Namespaces {
		if n.Type == specs.NetworkNamespace || n.Type == specs.UTSNamespace {
			t.Errorf("the container leaves the pod's %s namespace", n.Type)
		}
	}

	s = spec(t, func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext = nil }, nil)
	if !slices.Contains(s.Linux.MaskedPaths, "/proc/kcore") || len(s.Linux.ReadonlyPaths) == 0 {
		t.Errorf("without a security context: masked %v, read-only %v", s.Linux.MaskedPaths, s.Linux.ReadonlyPaths)
	}

	s = spec(t, func(c *runtimeapi.ContainerConfig) {
		c.Tty = true
		c.Linux.SecurityContext.Privileged = true
		c.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_TARGET, TargetId: "abc"}
	}, &seccompChoice{runtimeDefault: true})
	if len(s.Linux.MaskedPaths) != 0 || s.Linux.Seccomp != nil || !slices.Contains(s.Process.Capabilities.Bounding, "CAP_SYS_ADMIN") || !s.Process.Terminal || !slices.Contains(s.Process.Env, "TERM=xterm") {
		t.Errorf("privileged: %+v", s.Process)
	}
	if !slices.Contains(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.PIDNamespace, Path: "container:abc"}) {
		t.Errorf("target: %v", s.Linux.Namespaces)
	}
}

func TestRefusals(t *testing.T) {
	type sandboxChange = func(*runtimeapi.LinuxSandboxSecurityContext)
	for field, change := range map[string]sandboxChange{
		"network": func(c *runtimeapi.LinuxSandboxSecurityContext) {
			c.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
		},
		"pid": func(c *runtimeapi.LinuxSandboxSecurityContext) {
			c.NamespaceOptions.Pid = runtimeapi.NamespaceMode_NODE
		},
		"ipc": func(c *runtimeapi.LinuxSandboxSecurityContext) {
			c.NamespaceOptions.Ipc = runtimeapi.NamespaceMode_NODE
		},
		"userns": func(c *runtimeapi.LinuxSandboxSecurityContext) {
			c.NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{}
		},
		"apparmor": func(c *runtimeapi.LinuxSandboxSecurityContext) { c.Apparmor = &runtimeapi.SecurityProfile{} },
	} {
		c := podConfig(t.TempDir())
		change(c.Linux.SecurityContext)
		if err := checkSandboxConfig(c, ""); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: got %v", field, err)
		}
	}
	labelled := podConfig(t.TempDir())
	labelled.Linux.SecurityContext.SelinuxOptions = &runtimeapi.SELinuxOption{Type: "x"}
	if err := checkSandboxConfig(labelled, ""); err != nil {
		t.Errorf("admission lets SELinux options through, and here: %v", err)
	}
	for field, change := range map[string]func(*runtimeapi.ContainerConfig){
		"CDI":   func(c *runtimeapi.ContainerConfig) { c.CDIDevices = []*runtimeapi.CDIDevice{{Name: "gpu"}} },
		"image": func(c *runtimeapi.ContainerConfig) { c.Image = nil },
		"run_as_user": func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: -1}
		},
		"hugepages": func(c *runtimeapi.ContainerConfig) {
			c.Linux.Resources = &runtimeapi.LinuxContainerResources{HugepageLimits: []*runtimeapi.HugepageLimit{{PageSize: "2MB", Limit: 1}}}
		},
	} {
		c := ctrConfig("main")
		change(c)
		if err := checkContainerConfig(c); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: got %v", field, err)
		}
	}
	for _, uid := range []string{"", "../x", "a/b", "-x", "a,b", strings.Repeat("a", 64)} {
		if checkPodUID(uid) == nil {
			t.Errorf("pod UID %q was taken", uid)
		}
	}
}

func TestResolveUser(t *testing.T) {
	tree := fstest.MapFS{
		"etc/passwd": {Data: []byte("root:x:0:0::/root:/bin/sh\nweb:x:100:101::/:/bin/sh\n")},
		"etc/group":  {Data: []byte("root:x:0:\nweb:x:101:\naudio:x:29:web\nvideo:x:44:web,root\n")},
	}
	id := func(v int64) *runtimeapi.Int64Value { return &runtimeapi.Int64Value{Value: v} }
	for _, tc := range []struct {
		name  string
		image string
		sc    *runtimeapi.LinuxContainerSecurityContext
		want  specs.User
		fails bool
	}{
		{name: "nobody says", want: specs.User{AdditionalGids: []uint32{0, 44}}},
		{name: "image by name", image: "web", want: specs.User{UID: 100, GID: 101, AdditionalGids: []uint32{29, 44, 101}}},
		{name: "image by name and group", image: "web:audio", want: specs.User{UID: 100, GID: 29, AdditionalGids: []uint32{29, 44}}},
		{name: "number without an entry", image: "1234", want: specs.User{UID: 1234, AdditionalGids: []uint32{0}}},
		{name: "pod over image", image: "web", sc: &runtimeapi.LinuxContainerSecurityContext{RunAsUser: id(0), RunAsGroup: id(5)}, want: specs.User{GID: 5, AdditionalGids: []uint32{5, 44}}},
		{name: "group over image's", image: "web:audio", sc: &runtimeapi.LinuxContainerSecurityContext{RunAsGroup: id(5)}, want: specs.User{UID: 100, GID: 5, AdditionalGids: []uint32{5, 29, 44}}},
		{name: "merge", image: "web", sc: &runtimeapi.LinuxContainerSecurityContext{SupplementalGroups: []int64{1000}}, want: specs.User{UID: 100, GID: 101, AdditionalGids: []uint32{29, 44, 101, 1000}}},
		{name: "strict", image: "web", sc: &runtimeapi.LinuxContainerSecurityContext{SupplementalGroups: []int64{1000}, SupplementalGroupsPolicy: runtimeapi.SupplementalGroupsPolicy_Strict}, want: specs.User{UID: 100, GID: 101, AdditionalGids: []uint32{101, 1000}}},
		{name: "unknown name", image: "ghost", fails: true},
		{name: "group alone", sc: &runtimeapi.LinuxContainerSecurityContext{RunAsGroup: id(5)}, fails: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := resolveUser(tree, tc.image, tc.sc)
			if tc.fails {
				if !errdefs.IsInvalidArgument(err) {
					t.Fatalf("got %v, %v", got, err)
				}
				return
			}
			if err != nil || got.UID != tc.want.UID || got.GID != tc.want.GID || !slices.Equal(got.AdditionalGids, tc.want.AdditionalGids) {
				t.Fatalf("got %+v, %v; want %+v", got, err, tc.want)
			}
		})
	}
}

func TestSeccompProfiles(t *testing.T) {
	root := t.TempDir()
	os.MkdirAll(filepath.Join(root, "seccomp"), 0o755)
	os.WriteFile(filepath.Join(root, "seccomp/ok.json"), []byte(`{"defaultAction":"SCMP_ACT_LOG"}`), 0o644)
	os.Symlink("/etc/passwd", filepath.Join(root, "seccomp/out.json"))
	local := func(ref string) *runtimeapi.LinuxContainerSecurityContext {
		return &runtimeapi.LinuxContainerSecurityContext{Seccomp: &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: ref}}
	}
	for _, ref := range []string{"ok.json", filepath.Join(root, "seccomp/ok.json")} {
		if c, err := chooseSeccomp(local(ref), root, []string{"seccomp"}); err != nil || c.profile.DefaultAction != specs.ActLog {
			t.Errorf("%s: %+v, %v", ref, c, err)
		}
	}
	for _, ref := range []string{"missing.json", "out.json"} {
		if _, err := chooseSeccomp(local(ref), root, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", ref, err)
		}
	}
	if _, err := chooseSeccomp(&runtimeapi.LinuxContainerSecurityContext{Seccomp: &runtimeapi.SecurityProfile{}}, "", []string{"userns"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a guest without seccomp: %v", err)
	}
}

func TestSignals(t *testing.T) {
	for name, want := range map[string]syscall.Signal{"SIGTERM": 15, "term": 15, "9": 9, "SIGRTMIN": 34, "SIGRTMIN+3": 37, "RTMAX-1": 63, "SIGCLD": syscall.SIGCHLD, "SIGPOLL": syscall.SIGIO} {
		if got, err := parseSignal(name); err != nil || got != want {
			t.Errorf("%s: got %d, %v", name, got, err)
		}
	}
	for _, name := range []string{"", "SIGNOTHING", "0", "65", "SIGRTMIN+99"} {
		if got, err := parseSignal(name); err == nil {
			t.Errorf("%q: got %d", name, got)
		}
	}
	for v, name := range runtimeapi.Signal_name {
		if v != 0 {
			if _, err := parseSignal(criSignalName(runtimeapi.Signal(v))); err != nil {
				t.Errorf("CRI's %s: %v", name, err)
			}
		}
	}
	if s := toCRISignal("SIGRTMIN+3"); s != runtimeapi.Signal_SIGRTMINPLUS3 {
		t.Error(s)
	}
	if s := toCRISignal("3"); s != runtimeapi.Signal_SIGQUIT {
		t.Error(s)
	}
}

func TestSizeWithoutAHint(t *testing.T) {
	s := &Server{config: Config{GuestOverhead: func(int64) int64 { return 100 * mib }, DefaultEphemeralBytes: 1}}
	z := s.sizeOf(nil, &runtimeapi.PodSandboxConfig{})
	if z.cpus != 1 || z.memory != 612*mib {
		t.Errorf("default: %+v", z)
	}
	z = s.sizeOf(nil, &runtimeapi.PodSandboxConfig{Linux: &runtimeapi.LinuxPodSandboxConfig{
		Resources: &runtimeapi.LinuxContainerResources{CpuQuota: 150000, CpuPeriod: 100000, MemoryLimitInBytes: 1024 * mib},
		Overhead:  &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 200 * mib},
	}})
	if z.cpus != 2 || z.memory != 1224*mib {
		t.Errorf("limits: %+v", z)
	}
}
