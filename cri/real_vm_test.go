package cri

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/uuid"
	"github.com/vishvananda/netlink"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/netplugin/netplugintest"
	"github.com/openatoll/atoll/netplugin/tap"
	"github.com/openatoll/atoll/storage/image"
	"github.com/openatoll/atoll/storage/local"
	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/guestimage"
	"github.com/openatoll/atoll/vmpod/qemu"
)

func TestMain(m *testing.M) {
	qemu.RunProbeChild()
	netplugintest.Isolate(m)
}

// A realHost is the real parts on directories of the test's own, in a network
// namespace of the test's own.
type realHost struct {
	dir, run string
	driver   *qemu.Driver
	network  *tap.Network
	images   *image.Store
	disks    *local.Ephemeral
	busybox  string // reference of the test image
}

func newRealHost(t *testing.T, change ...func(*qemu.Config)) *realHost {
	t.Helper()
	if testing.Short() {
		t.Skip("boots VMs")
	}
	netplugintest.Isolated(t)
	guest, err := guestimage.Load("../build/guest")
	if err != nil {
		t.Skipf("needs a guest: %v", err)
	}
	up(t)
	// Not t.TempDir: its paths are too long for sockets.
	run, err := os.MkdirTemp("/run", "atoll-cri-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		os.RemoveAll(run)
		cgroups, _ := filepath.Glob("/sys/fs/cgroup/*/" + filepath.Base(run)) // the driver's parent of all VMs
		for _, c := range append(cgroups, "/sys/fs/cgroup/"+filepath.Base(run)) {
			os.Remove(c)
		}
	})
	h := &realHost{dir: t.TempDir(), run: run}
	os.Chmod(h.dir, 0o711)
	os.Chmod(filepath.Dir(h.dir), 0o711)
	if h.images, err = image.Open(t.Context(), image.Config{Root: h.dir + "/images", Logger: slog.New(slog.DiscardHandler)}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.images.Close() })
	if h.disks, err = local.NewEphemeral(local.Config{Dir: h.dir + "/disks"}); err != nil {
		t.Fatal(err)
	}
	if h.network, err = tap.New(tap.Config{StateDir: h.dir + "/net", NodeIP: netip.MustParseAddr("198.18.0.1")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.network.Close() })
	if err := h.network.Configure(t.Context(), []netip.Prefix{netip.MustParsePrefix("198.19.9.0/24")}); err != nil {
		t.Fatal(err)
	}
	cfg := qemu.Config{
		Guest: qemu.Guest{Kernel: guest.Kernel, Initrd: guest.Initrd, Cmdline: guest.Cmdline},
		UID:   400417, GID: 400417, UIDs: 65536, StateDir: h.dir + "/vms", RunDir: run + "/vm", Cgroup: filepath.Base(run),
		Logger: slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	}
	for _, f := range change {
		f(&cfg)
	}
	if h.driver, err = qemu.New(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background() // the test's is over
		ms, err := h.driver.List(ctx)
		for _, m := range ms {
			m.Remove(ctx)
		}
		if err != nil || len(ms) > 0 {
			t.Errorf("%d machines left, %v", len(ms), err)
		}
		h.driver.Close()
	})
	h.busybox = pushBusybox(t)
	return h
}

// up gives the namespace a loopback and the node's address.
func up(t *testing.T) {
	t.Helper()
	nl, err := netlink.NewHandle()
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	lo, err := nl.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := nl.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	nl.AddrReplace(lo, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(198, 18, 0, 1), Mask: net.CIDRMask(32, 32)}})
}

// A program is one more of an image.
type program struct {
	name string
	body []byte
}

// pushBusybox serves an image with a static busybox, and more, from a registry
// on loopback.
func pushBusybox(t *testing.T, more ...program) string {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("needs busybox-static")
	}
	bin, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h *tar.Header, body []byte) {
		h.Size = int64(len(body))
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		w.Write(body)
	}
	for _, d := range []string{"bin/", "etc/", "tmp/", "proc/", "sys/", "dev/"} {
		add(&tar.Header{Name: d, Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	}
	add(&tar.Header{Name: "bin/busybox", Mode: 0o755}, bin)
	for _, a := range []string{"sh", "ls", "cat", "echo", "sleep", "id", "nc", "wget", "hostname", "ps", "httpd", "mkdir", "stty", "dd", "tail", "head", "grep", "env", "kill", "touch", "true", "ip", "nslookup", "wc", "mount", "df"} {
		add(&tar.Header{Name: "bin/" + a, Typeflag: tar.TypeSymlink, Linkname: "busybox"}, nil)
	}
	for _, p := range more {
		add(&tar.Header{Name: p.name, Mode: 0o755}, p.body)
	}
	add(&tar.Header{Name: "etc/passwd", Mode: 0o644}, []byte("root:x:0:0::/:/bin/sh\nweb:x:100:101::/:/bin/sh\n"))
	add(&tar.Header{Name: "etc/group", Mode: 0o644}, []byte("root:x:0:\nweb:x:101:\naudio:x:29:web\n"))
	w.Close()
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err == nil {
		img, err = mutate.ConfigFile(img, &v1.ConfigFile{OS: "linux", Architecture: "amd64", RootFS: rootFS(t, img), Config: v1.Config{
			Cmd: []string{"sh"}, Env: []string{"PATH=/bin"},
		}})
	}
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	ref, err := name.ParseReference(strings.TrimPrefix(srv.URL, "http://")+"/busybox:1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	return ref.String()
}

func rootFS(t *testing.T, img v1.Image) v1.RootFS {
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	return c.RootFS
}

func (h *realHost) serve(t *testing.T) *testServer {
	return serve(t, newFakeHost(), h.dir, func(c *Config) {
		c.Driver, c.Network, c.Images, c.Ephemeral = h.driver, h.network, h.images, h.disks
		c.Logger = slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
}

// consoles shows what the guests printed, for a test that hangs.
func (h *realHost) consoles(t *testing.T) {
	files, _ := filepath.Glob(h.dir + "/vms/*/console.log")
	for _, f := range files {
		b, _ := os.ReadFile(f)
		t.Logf("%s:\n%s", f, b[max(0, len(b)-4096):])
	}
}

// left lists what is on the host beside images.
func (h *realHost) left(t *testing.T) []string {
	var out []string
	ms, err := h.driver.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range ms {
		out = append(out, "machine "+m.Spec().ID.String())
	}
	as, _ := h.network.List(t.Context())
	for _, a := range as {
		out = append(out, "attachment "+a.Key)
	}
	ds, _ := h.disks.List(t.Context())
	for _, d := range ds {
		out = append(out, "disk "+d)
	}
	links, _ := netlink.LinkList()
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, "atl") {
			out = append(out, "link "+l.Attrs().Name)
		}
	}
	return out
}

func (s *testServer) exec(t *testing.T, ctr string, cmd ...string) string {
	t.Helper()
	r, err := s.rt.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: ctr, Cmd: cmd, Timeout: 30})
	if err != nil {
		t.Fatalf("exec %q: %v", cmd, err)
	}
	if r.ExitCode != 0 {
		t.Fatalf("exec %q: exit %d: %s%s", cmd, r.ExitCode, r.Stdout, r.Stderr)
	}
	return string(r.Stdout)
}

// TestRealPod runs a pod on the real parts: prepared, with volumes that
// change, logs, exec, a restart of the daemon in the middle, an exit with its
// message, and nothing left behind.
func TestRealPod(t *testing.T) {
	h := newRealHost(t)
	s := h.serve(t)
	if _, err := s.img.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: h.busybox}}); err != nil {
		t.Fatal(err)
	}
	uid := uuid.NewString()
	config := podConfig(h.dir)
	config.Metadata.Uid, config.Labels[kubeletUIDLabel] = uid, uid
	config.LogDirectory = h.dir + "/logs"
	start := time.Now()
	s.Prepare(t.Context(), vmpod.Hint{Owner: vmpod.Owner{PodUID: uid, Namespace: "default", Name: "web"}, CPUs: 1, Memory: 256 * mib, Images: []string{h.busybox}})
	r, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: config})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("sandbox ready after %s", time.Since(start))

	pod := filepath.Join(h.dir, "kubelet/pods", uid)
	vol := filepath.Join(pod, "volumes/kubernetes.io~configmap/cfg")
	publish := func(version string) {
		os.MkdirAll(filepath.Join(vol, "..v"+version), 0o755)
		os.WriteFile(filepath.Join(vol, "..v"+version, "key"), []byte("value "+version), 0o644)
		os.Symlink("..v"+version, filepath.Join(vol, "..data_tmp"))
		os.Rename(filepath.Join(vol, "..data_tmp"), filepath.Join(vol, "..data"))
		os.Symlink("..data/key", filepath.Join(vol, "key"))
	}
	publish("1")
	scratch := filepath.Join(pod, "volumes/kubernetes.io~empty-dir/scratch")
	message := filepath.Join(pod, "containers/main/1a2b3c4d")
	os.MkdirAll(scratch, 0o755)
	os.MkdirAll(filepath.Dir(message), 0o755)
	os.WriteFile(message, nil, 0o666)
	os.WriteFile(filepath.Join(pod, "etc-hosts"), []byte("198.19.9.2\tweb\n"), 0o644)

	c := ctrConfig("main")
	c.Image.Image = h.busybox
	c.Command = []string{"sh", "-c", `trap 'echo bye >/dev/termination-log; echo stopping; exit 7' TERM; echo started; i=0; while :; do sleep 0.2 & wait $!; done`}
	c.Mounts = []*runtimeapi.Mount{
		{ContainerPath: "/cfg", HostPath: vol, Readonly: true},
		{ContainerPath: "/scratch", HostPath: scratch},
		{ContainerPath: "/etc/hosts", HostPath: filepath.Join(pod, "etc-hosts")},
		{ContainerPath: "/dev/termination-log", HostPath: message},
	}
	c.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512, MemoryLimitInBytes: 64 * mib}
	c.Linux.SecurityContext.RunAsUsername = "web"
	c.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{}
	c.Linux.SecurityContext.NoNewPrivs = true
	side := ctrConfig("side")
	side.Image.Image = h.busybox
	side.Command = []string{"sh", "-c", "echo hello from side; httpd -f -p 8080 -h /scratch"}
	side.Mounts = []*runtimeapi.Mount{{ContainerPath: "/scratch", HostPath: scratch}}
	create := func(c *runtimeapi.ContainerConfig) string {
		t.Helper()
		resp, err := s.rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: r.PodSandboxId, Config: c, SandboxConfig: config})
		if err != nil {
			t.Fatal(err)
		}
		s.start(t, resp.ContainerId)
		return resp.ContainerId
	}
	main, aside := create(c), create(side)
	t.Logf("containers running after %s", time.Since(start))
	mainLog := filepath.Join(config.LogDirectory, "main/0.log")
	eventually(t, "first log line", func() bool { b, _ := os.ReadFile(mainLog); return len(b) > 0 })

	for _, tc := range []struct{ cmd, want string }{
		{"id", "uid=100(web) gid=101(web) groups=29(audio),101(web)"},
		{"hostname", "web"},
		{"cat /cfg/key", "value 1"},
		{"cat /etc/hosts", "web"},
		{"cat /etc/resolv.conf", "198.18.64.10"},
		{"grep NoNewPrivs /proc/self/status", "1"},
		{"grep Seccomp: /proc/self/status", "2"},
		{"cat /sys/fs/cgroup/memory.max", "67108864"},
		{"cat /sys/fs/cgroup/cpu.max", "50000 100000"},
		{"df /dev/shm", "/dev/shm"},
	} {
		if got := s.exec(t, main, "sh", "-c", tc.cmd); !strings.Contains(got, tc.want) {
			t.Errorf("%s: got %q, want %q", tc.cmd, got, tc.want)
		}
	}
	s.exec(t, aside, "sh", "-c", "echo shared >/scratch/index.html; wget -qO- http://127.0.0.1:8080/")
	if got := s.exec(t, main, "cat", "/scratch/index.html"); got != "shared\n" {
		t.Errorf("emptyDir is not shared: %q", got)
	}
	// From the node, as a probe does.
	st, _ := s.rt.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: r.PodSandboxId})
	if resp, err := http.Get("http://" + net.JoinHostPort(st.Status.Network.Ip, "8080") + "/"); err != nil {
		t.Errorf("the node does not reach the pod: %v", err)
	} else {
		resp.Body.Close()
	}
	began := time.Now()
	publish("2")
	eventually(t, "volume updated in the guest", func() bool { return s.exec(t, main, "cat", "/cfg/key") == "value 2" })
	t.Logf("volume updated after %s", time.Since(began))

	big := s.exec(t, aside, "sh", "-c", "dd if=/dev/zero bs=1M count=3 2>/dev/null")
	if len(big) != 3<<20 {
		t.Errorf("ExecSync returned %d bytes", len(big))
	}
	began = time.Now()
	for range 10 {
		s.exec(t, aside, "true")
	}
	t.Logf("exec round trip %s", time.Since(began)/10)
	stats, err := s.rt.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{})
	if err != nil || len(stats.Stats) != 1 || len(stats.Stats[0].Linux.Containers) != 2 || stats.Stats[0].Linux.Containers[0].Memory.WorkingSetBytes.GetValue() == 0 ||
		stats.Stats[0].Linux.Cpu.UsageCoreNanoSeconds.GetValue() == 0 || stats.Stats[0].Linux.Network.DefaultInterface.RxBytes.GetValue() == 0 {
		t.Errorf("stats %v, %v", stats, err)
	}
	if u, err := s.VolumeUsage(t.Context(), uid, scratch); err != nil || u.Bytes == 0 {
		t.Errorf("volume usage %+v, %v", u, err)
	}

	// The daemon goes away and comes back; the side container ends meanwhile.
	s.stop()
	time.Sleep(300 * time.Millisecond)
	began = time.Now()
	s = h.serve(t)
	if got := s.exec(t, main, "cat", "/cfg/key"); got != "value 2" {
		t.Errorf("after the restart: %q", got)
	}
	t.Logf("exec works %s after the restart", time.Since(began))
	if _, err := s.rt.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: main, Timeout: 10}); err != nil {
		t.Fatal(err)
	}
	if st := s.status(t, main); st.ExitCode != 7 || st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.Reason != "Error" {
		t.Errorf("main ended as %v", st)
	}
	if b, _ := os.ReadFile(message); string(b) != "bye\n" {
		t.Errorf("termination message %q", b)
	}
	if got := strings.Join(logText(t, mainLog), "|"); got != "stdout F started|stdout F stopping" {
		t.Errorf("log %q", got)
	}
	// Out of memory.
	oom := ctrConfig("oom")
	oom.Image.Image = h.busybox
	oom.Command = []string{"sh", "-c", "dd if=/dev/zero of=/dev/null bs=100M count=1; echo survived"}
	oom.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 16 * mib}
	o := create(oom)
	eventually(t, "OOM seen", func() bool { return s.status(t, o).State == runtimeapi.ContainerState_CONTAINER_EXITED })
	if st := s.status(t, o); st.Reason != "OOMKilled" || st.ExitCode != 137 {
		t.Errorf("oom: %v", st)
	}
	// A command that is not there.
	bad := ctrConfig("bad")
	bad.Image.Image = h.busybox
	bad.Command = []string{"/not/there"}
	resp, err := s.rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: r.PodSandboxId, Config: bad, SandboxConfig: config})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.rt.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: resp.ContainerId}); err == nil || !strings.Contains(err.Error(), "/not/there") {
		t.Errorf("start of a missing command: %v", err)
	}

	began = time.Now()
	if _, err := s.rt.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: r.PodSandboxId}); err != nil {
		t.Fatal(err)
	}
	t.Logf("StopPodSandbox took %s", time.Since(began))
	if _, err := s.rt.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: r.PodSandboxId}); err != nil {
		t.Fatal(err)
	}
	if left := h.left(t); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestCrictl plays a session with the peers' tool.
func TestCrictl(t *testing.T) {
	h := newRealHost(t)
	tool, err := filepath.Abs("../bin/crictl")
	if _, serr := os.Stat(tool); err != nil || serr != nil {
		t.Skip("needs bin/crictl (make build)")
	}
	s := h.serve(t)
	sock := h.run + "/cri.sock"
	l, err := Listen(sock)
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(t.Context(), l)
	crictl := func(stdin string, args ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, tool, append([]string{"--runtime-endpoint=unix://" + sock, "--image-endpoint=unix://" + sock, "--timeout=60s"}, args...)...)
		cmd.Stdin = strings.NewReader(stdin)
		var out, errOut bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errOut
		defer time.AfterFunc(30*time.Second, func() { h.consoles(t) }).Stop()
		if err := cmd.Run(); err != nil {
			t.Fatalf("crictl %s: %v\n%s%s", strings.Join(args, " "), err, out.String(), errOut.String())
		}
		t.Logf("crictl %s\n%s", strings.Join(args, " "), out.String())
		return strings.TrimSpace(out.String())
	}
	file := func(name string, v any) string {
		b, _ := json.Marshal(v)
		p := filepath.Join(h.dir, name)
		os.WriteFile(p, b, 0o600)
		return p
	}
	small := filepath.Join(h.dir, "small")
	os.MkdirAll(small, 0o755)
	os.WriteFile(small+"/file", []byte("copied\n"), 0o644)
	pod := file("pod.json", map[string]any{"metadata": map[string]any{"name": "p", "namespace": "default", "uid": "crictl-1"}, "log_directory": h.dir + "/crictl-logs", "linux": map[string]any{}})
	ctr := file("ctr.json", map[string]any{
		"metadata": map[string]any{"name": "c"}, "image": map[string]any{"image": h.busybox}, "log_path": "c.log",
		"command": []string{"sh", "-c", "echo to stdout; echo to stderr >&2; cat; httpd -f -p 8080 -h /small"}, "linux": map[string]any{},
		"stdin": true, "stdin_once": true,
		"mounts": []any{map[string]any{"host_path": small, "container_path": "/small"}},
	})
	crictl("", "info")
	crictl("", "pull", h.busybox)
	crictl("", "images")
	p := crictl("", "runp", pod)
	c := crictl("", "create", p, ctr, pod)
	crictl("", "start", c)
	crictl("", "ps")
	crictl("", "pods")
	// attach goes on as long as the container does: end it by its time.
	attached, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	attach := exec.CommandContext(attached, tool, "--runtime-endpoint=unix://"+sock, "attach", "-i", c)
	attach.Stdin = strings.NewReader("from the client\n")
	out, _ := attach.CombinedOutput()
	if !strings.Contains(string(out), "from the client") {
		t.Errorf("attach: %q", out)
	}
	eventually(t, "attached stdin reached the log", func() bool {
		b, _ := os.ReadFile(h.dir + "/crictl-logs/c.log")
		return strings.Contains(string(b), "from the client")
	})
	if got := crictl("", "exec", c, "cat", "/small/file"); got != "copied" {
		t.Errorf("exec: %q", got)
	}
	if got := crictl("through stdin", "exec", "-i", c, "cat"); got != "through stdin" {
		t.Errorf("exec -i: %q", got)
	}
	if got := crictl("through a WebSocket", "exec", "-i", "--transport", "websocket", c, "cat"); got != "through a WebSocket" {
		t.Errorf("exec -i over WebSocket: %q", got)
	}
	if got := crictl("", "exec", "--sync", c, "hostname"); got != "p" {
		t.Errorf("exec --sync: %q", got)
	}
	if got := crictl("", "logs", c); !strings.Contains(got, "to stdout") {
		t.Errorf("logs: %q", got)
	}
	crictl("", "stats")
	crictl("", "statsp")
	crictl("", "inspectp", p)
	crictl("", "inspect", c)
	crictl("", "imagefsinfo")
	forward(t, tool, sock, p)
	crictl("", "stop", c)
	crictl("", "rm", c)
	crictl("", "stopp", p)
	crictl("", "rmp", p)
	crictl("", "rmi", h.busybox)
	if left := h.left(t); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// forward reaches the pod's web server through crictl port-forward.
func forward(t *testing.T, tool, sock, sandbox string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	cmd := exec.CommandContext(t.Context(), tool, "--runtime-endpoint=unix://"+sock, "port-forward", sandbox, fmt.Sprintf("%d:8080", port))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	eventually(t, "port-forward answers", func() bool {
		resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/file", port))
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return string(b) == "copied\n"
	})
}
