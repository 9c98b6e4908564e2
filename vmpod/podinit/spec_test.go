package podinit

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func testComposition() composition {
	return composition{
		root: "/r", cgroup: "/atoll/c", shm: "/dev/shm", devices: true,
		containerPID: func(id string) (string, error) {
			if id != "other" {
				return "", fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
			}
			return "/proc/7/ns/pid", nil
		},
	}
}

func destinations(s *specs.Spec) (out []string) {
	for _, m := range s.Mounts {
		out = append(out, m.Destination+"="+m.Source)
	}
	return out
}

func TestCompose(t *testing.T) {
	in := ociSpec("sh")
	in.Hostname = "elsewhere"
	in.Linux.Sysctl = map[string]string{"net.core.somaxconn": "7"}
	in.Mounts = append(in.Mounts,
		specs.Mount{Destination: "/host", Type: "bind", Source: "/etc"},
		specs.Mount{Destination: "/volume", Type: "tmpfs", Source: "tmpfs"})
	in.Linux.CgroupsPath = "/kubepods/x"
	swap := int64(5)
	in.Linux.Resources.Memory = &specs.LinuxMemory{Swap: &swap}
	c := testComposition()
	c.readonly, c.terminal = true, true
	c.binds = []bind{
		{source: "/etc/h", destination: "/etc/hostname", optional: true},
		{source: "/v/1/deep", destination: "/volume/a/b"}, {source: "/v/1", destination: "/volume/", readOnly: true, recursive: true, propagation: "rslave"},
		{source: "/v/2", destination: "/etc/hostname"},
	}
	got, sysctls, err := compose(mustJSON(t, in), c)
	if err != nil {
		t.Fatal(err)
	}
	if *got.Root != (specs.Root{Path: "/r", Readonly: true}) || got.Hostname != "" || got.Linux.CgroupsPath != "/atoll/c" || !got.Process.Terminal {
		t.Errorf("root %v, hostname %q, cgroup %q", got.Root, got.Hostname, got.Linux.CgroupsPath)
	}
	if got.Process.OOMScoreAdj == nil || got.Linux.Resources.Unified["memory.oom.group"] != "1" || got.Linux.Resources.Memory.Swap != nil || got.Linux.Resources.Devices == nil {
		t.Errorf("resources %+v", got.Linux.Resources)
	}
	if sysctls["net.core.somaxconn"] != "7" || got.Linux.Sysctl != nil {
		t.Errorf("sysctls %v, left %v", sysctls, got.Linux.Sysctl)
	}
	var types []string
	for _, ns := range got.Linux.Namespaces {
		types = append(types, string(ns.Type)+":"+ns.Path)
	}
	if slices.Sort(types); !slices.Equal(types, []string{"cgroup:", "mount:", "pid:"}) {
		t.Errorf("namespaces %v", types)
	}
	want := []string{"/proc=proc", "/dev=tmpfs", "/sys=sysfs", "/volume/=/v/1", "/dev/pts=devpts", "/dev/shm=/dev/shm", "/dev/mqueue=mqueue",
		"/etc/hostname=/v/2", "/sys/fs/cgroup=cgroup", "/volume/a/b=/v/1/deep"}
	if d := destinations(got); !slices.Equal(d, want) {
		t.Errorf("mounts\n%v, want\n%v", d, want)
	}
	for _, m := range got.Mounts {
		if m.Destination == "/volume/" && !slices.Equal(m.Options, []string{"rbind", "rslave", "ro", "rro"}) {
			t.Errorf("options %v", m.Options)
		}
	}
}

func TestComposePIDNamespace(t *testing.T) {
	with := func(path string) []byte {
		s := ociSpec("sh")
		s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.PIDNamespace, Path: path}}
		return mustJSON(t, s)
	}
	for _, c := range []struct{ name, path, shared, want string }{
		{"own", "", "", ""},
		{"the pod's", "", "/proc/5/ns/pid", "/proc/5/ns/pid"},
		{"another container's", "container:other", "", "/proc/7/ns/pid"},
		{"the host's, which is not here", "/proc/1/ns/pid", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			comp := testComposition()
			comp.sharedPID = c.shared
			s, _, err := compose(with(c.path), comp)
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace })
			if i < 0 || s.Linux.Namespaces[i].Path != c.want {
				t.Errorf("namespaces %v, want the path %q", s.Linux.Namespaces, c.want)
			}
		})
	}
	if _, _, err := compose(with("container:nobody"), testComposition()); !errdefs.IsNotFound(err) {
		t.Errorf("joining nobody: %v", err)
	}
}

func TestComposeRefuses(t *testing.T) {
	for name, change := range map[string]func(*specs.Spec){
		"no command": func(s *specs.Spec) { s.Process.Args = nil },
		"no process": func(s *specs.Spec) { s.Process = nil },
		"hooks":      func(s *specs.Spec) { s.Hooks = &specs.Hooks{} },
		"a host's namespace": func(s *specs.Spec) {
			s.Linux.Namespaces = []specs.LinuxNamespace{{Type: "user", Path: "/proc/9/ns/user"}}
		},
		"relative mount": func(s *specs.Spec) { s.Mounts = []specs.Mount{{Destination: "x", Type: "tmpfs"}} },
	} {
		t.Run(name, func(t *testing.T) {
			s := ociSpec("sh")
			change(s)
			b, _ := json.Marshal(s)
			if _, _, err := compose(b, testComposition()); !errdefs.IsInvalidArgument(err) {
				t.Errorf("got %v", err)
			}
		})
	}
	if _, _, err := compose([]byte("{"), testComposition()); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no JSON: %v", err)
	}
}

func TestCgroupValues(t *testing.T) {
	var r specs.LinuxResources
	err := json.Unmarshal([]byte(`{"cpu":{"shares":1024,"quota":50000,"period":100000,"cpus":"0-1"},"memory":{"limit":1048576,"reservation":-1},"pids":{"limit":-1},"unified":{"memory.high":"5"}}`), &r)
	if err != nil {
		t.Fatal(err)
	}
	values, err := cgroupValues(&r, map[string]string{"io.weight": "9"})
	var got []string
	for _, v := range values {
		got = append(got, v.file+"="+v.value)
	}
	if want := "cpu.weight=39 cpu.max=50000 100000 cpuset.cpus=0-1 memory.low=max memory.max=1048576 pids.max=max memory.high=5 io.weight=9"; err != nil || strings.Join(got, " ") != want {
		t.Errorf("got %v, %v, want %s", got, err, want)
	}
	for _, file := range []string{"../memory.max", "cgroup.kill", "tasks"} {
		if _, err := cgroupValues(&specs.LinuxResources{}, map[string]string{file: "1"}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", file, err)
		}
	}
	for shares, weight := range map[uint64]uint64{0: 1, 2: 1, 1024: 39, 262144: 10000, 1 << 40: 10000} {
		if got := weightOfShares(shares); got != weight {
			t.Errorf("shares %d: weight %d, want %d", shares, got, weight)
		}
	}
}

func TestComposeUserNamespace(t *testing.T) {
	in := ociSpec("sh")
	in.Mounts = []specs.Mount{{Destination: "/proc", Type: "proc"}, {Destination: "/sys", Type: "sysfs", Options: []string{"ro"}}}
	for _, path := range []string{"", "/proc/5/ns/user"} {
		c := testComposition()
		c.userns = path
		s, _, err := compose(mustJSON(t, in), c)
		if err != nil {
			t.Fatal(err)
		}
		joined := slices.Contains(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace, Path: path})
		i := slices.IndexFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == "/sys" })
		bound := s.Mounts[i].Type == "bind" && s.Mounts[i].Source == "/sys" && slices.Contains(s.Mounts[i].Options, "ro")
		if joined != (path != "") || bound != (path != "") {
			t.Errorf("%q: namespaces %v, /sys is %v", path, s.Linux.Namespaces, s.Mounts[i])
		}
	}
}

func TestIDMaps(t *testing.T) {
	if m, err := idMaps(&agentapi.IDMap{First: 1000, Length: 100000}); err != nil || m[0].HostID != 1000 || m[0].Size != 100000 {
		t.Errorf("%v, %v", m, err)
	}
	for _, bad := range []*agentapi.IDMap{{First: 1000}, {First: 1<<32 - 2, Length: 10}} {
		if _, err := idMaps(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}
