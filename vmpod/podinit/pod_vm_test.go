package podinit

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// TestPod boots one VM and goes through a pod's life in it.
func TestPod(t *testing.T) {
	start := time.Now()
	vm := bootVM(t)
	c := vm.attach()
	t.Logf("QEMU's start to the session: %v", time.Since(start).Round(time.Millisecond))
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	g := guestOps{c, t, ctx}

	hello, err := c.Hello(ctx, &agentapi.HelloRequest{})
	if err != nil || hello.SandboxReady || hello.Kernel == "" {
		t.Fatalf("hello: %v, %v", hello, err)
	}
	t.Logf("kernel %s, features %v, up %v", hello.Kernel, hello.Features, time.Duration(hello.UptimeNs).Round(time.Millisecond))
	if _, err := c.AddVolume(ctx, &agentapi.AddVolumeRequest{Id: "v"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("before the sandbox was set up: %v", err)
	}
	if _, err := c.PortForward(ctx, 80); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a stream before the sandbox was set up: %v", err)
	}
	at := time.Now()
	if _, err := c.SetupSandbox(ctx, setupRequest()); err != nil {
		t.Fatal(err)
	}
	t.Logf("SetupSandbox: %v", time.Since(at).Round(time.Millisecond))

	t.Run("container", func(t *testing.T) { testContainer(guestOps{c, t, ctx}) })
	t.Run("identity", func(t *testing.T) { testIdentity(guestOps{c, t, ctx}) })
	t.Run("ends", func(t *testing.T) { testEnds(guestOps{c, t, ctx}) })
	t.Run("exec", func(t *testing.T) { testExec(guestOps{c, t, ctx}) })
	t.Run("terminal", func(t *testing.T) { testTerminal(guestOps{c, t, ctx}) })
	t.Run("volumes", func(t *testing.T) { testVolumes(guestOps{c, t, ctx}) })
	t.Run("stdin", func(t *testing.T) { testStdin(guestOps{c, t, ctx}) })
	t.Run("port-forward", func(t *testing.T) { testPortForward(guestOps{c, t, ctx}) })
	t.Run("re-attach", func(t *testing.T) { g.Client = testReattach(vm, guestOps{c, t, ctx}) })
	t.Run("nothing is left", func(t *testing.T) { testNothingLeft(vm, guestOps{g.Client, t, ctx}) })
	if _, err := g.Shutdown(ctx, &agentapi.ShutdownRequest{}); err != nil {
		t.Error(err)
	}
	select {
	case <-g.Done():
	case <-time.After(time.Minute):
		t.Error("the VM did not power off")
	}
}

func testContainer(g guestOps) {
	at := time.Now()
	g.create("c1", ociSpec("sh", "-c", "echo out; echo err >&2; echo bye > /dev/termination-log; id -u; exec sleep 1000"), nil)
	created := time.Now()
	g.start("c1")
	g.t.Logf("create %v, start %v", created.Sub(at).Round(time.Millisecond), time.Since(created).Round(time.Millisecond))
	var lines []string
	for rec, err := range g.Logs(g.ctx, "c1", 1) {
		if err != nil {
			g.t.Fatal(err)
		}
		lines = append(lines, rec.Stream.String()+":"+string(rec.Line))
		if d := time.Since(time.Unix(0, rec.TimeNs)); d > time.Minute || d < -time.Minute {
			g.t.Errorf("a record is %v old: the clock is wrong", d)
		}
		if len(lines) == 3 {
			break
		}
	}
	if got := strings.Join(lines, " "); !strings.Contains(got, "STDOUT:out") || !strings.Contains(got, "STDERR:err") || !strings.Contains(got, "STDOUT:0") {
		g.t.Errorf("logs: %v", lines)
	}
	// A process that has not asked for a signal is safe from it as PID 1.
	if _, err := g.SignalProcess(g.ctx, &agentapi.SignalProcessRequest{ContainerId: "c1", Signal: 9}); err != nil {
		g.t.Fatal(err)
	}
	exit := g.wait("c1", "")
	if exit.ExitCode != 137 || exit.Reason != "Error" {
		g.t.Errorf("exit %v", exit)
	}
	if b, err := g.CopyOut(g.ctx, "c1", "/dev/termination-log", 4096); err != nil || string(b) != "bye\n" {
		g.t.Errorf("termination message %q, %v", b, err)
	}
	if b, err := g.CopyOut(g.ctx, "c1", "/inside", 4); err != nil || string(b) != "/sh\n" {
		g.t.Errorf("a link inside the root: %q, %v", b, err)
	}
	for _, p := range []string{"/escape", "/etc", "/nowhere", "/proc/1/root/etc/hostname", "/../../etc/hostname"} {
		if b, err := g.CopyOut(g.ctx, "c1", p, 4096); !errdefs.IsNotFound(err) && p != "/../../etc/hostname" {
			g.t.Errorf("copy out of %s: %q, %v", p, b, err)
		}
	}
	for rec, err := range g.Exits(g.ctx, 0) {
		if err != nil || rec.ContainerId != "c1" || rec.ExitCode != 137 {
			g.t.Errorf("exit journal: %v, %v", rec, err)
		}
		break
	}
	if _, err := g.Acknowledge(g.ctx, &agentapi.AcknowledgeRequest{ContainerId: "c1", Logs: 4, Exits: 1}); err != nil {
		g.t.Error(err)
	}
	g.remove("c1")
	g.remove("c1")
	if _, err := g.WaitProcess(g.ctx, &agentapi.WaitProcessRequest{ContainerId: "c1"}); !errdefs.IsNotFound(err) {
		g.t.Errorf("after removal: %v", err)
	}
}

func testIdentity(g guestOps) {
	out, exit := g.run("who", ociSpec("sh", "-c", "hostname; cat /etc/hostname /etc/resolv.conf; ip -o -4 addr show dev eth0; ip route; cat /sys/class/net/eth0/mtu; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; cat /proc/self/cgroup; cat /proc/self/oom_score_adj; cat /proc/1/comm; date +%Y"), nil)
	for _, want := range []string{
		"pod-1\npod-1\n", "search default.svc.cluster.local\nnameserver 198.18.64.10\noptions ndots:5\n", "198.19.0.7/32",
		"default via 169.254.1.1 dev eth0", "\n1400\n0\n0::/\n0\nsh\n", time.Now().UTC().Format("2006"),
	} {
		if !strings.Contains(out, want) {
			g.t.Errorf("no %q in\n%s", want, out)
		}
	}
	if exit.ExitCode != 0 || exit.Reason != "Completed" {
		g.t.Errorf("exit %v", exit)
	}
}

func testEnds(g guestOps) {
	if _, exit := g.run("three", ociSpec("sh", "-c", "exit 3"), nil); exit.ExitCode != 3 || exit.Reason != "Error" {
		g.t.Errorf("exit %v", exit)
	}
	limit := int64(16 << 20)
	greedy := ociSpec("sh", "-c", "x=0123456789abcdef; while :; do x=$x$x; done")
	greedy.Linux.Resources.Memory = limits(limit)
	if _, exit := g.run("greedy", greedy, nil); exit.ExitCode != 137 || exit.Reason != "OOMKilled" {
		g.t.Errorf("out of memory: %v", exit)
	}
	adj := 321
	scored := ociSpec("cat", "/proc/self/oom_score_adj")
	scored.Process.OOMScoreAdj = &adj
	if out, _ := g.run("scored", scored, nil); out != "321\n" {
		g.t.Errorf("oom_score_adj %q", out)
	}
	g.create("none", ociSpec("/no/such/command"), nil)
	_, err := g.StartProcess(g.ctx, &agentapi.StartProcessRequest{ContainerId: "none"})
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "/no/such/command") {
		g.t.Errorf("a command that is not there: %v", err)
	}
	if exit := g.wait("none", ""); exit.ExitCode != 128 || exit.Reason != "StartError" {
		g.t.Errorf("exit %v", exit)
	}
	if out := g.logs("none"); out != "" {
		g.t.Errorf("logs %q", out)
	}
	g.remove("none")
	ro, exit := g.run("ro", ociSpec("sh", "-c", "touch /x 2>&1; echo $?; touch /dev/shm/ok && echo shm"), func(r *agentapi.CreateContainerRequest) { r.ReadonlyRootfs = true })
	if !strings.Contains(ro, "Read-only file system\n1\nshm\n") || exit.ExitCode != 0 {
		g.t.Errorf("read-only root: %q", ro)
	}
	user := ociSpec("sh", "-c", "id; echo to-stderr > /dev/stderr; touch /tmp/x && echo wrote")
	user.Process.User.UID, user.Process.User.GID, user.Process.User.AdditionalGids = 1000, 1001, []uint32{1002}
	user.Process.Capabilities = nil
	if out, _ := g.run("user", user, nil); !strings.Contains(out, "uid=1000 gid=1001 groups=1002") || !strings.Contains(out, "to-stderr") || !strings.Contains(out, "wrote") {
		g.t.Errorf("as a user: %q", out)
	}
}

func testExec(g guestOps) {
	g.create("e", ociSpec("sleep", "1000"), nil)
	g.start("e")
	at := time.Now()
	out, errs, code := g.exec("e", "x1", "sh", "-c", "echo out; echo err >&2; exit 7")
	g.t.Logf("exec of sh: %v", time.Since(at).Round(time.Millisecond))
	if out != "out\n" || errs != "err\n" || code != 7 {
		g.t.Errorf("%q %q %d", out, errs, code)
	}
	if _, _, code := g.exec("e", "x2", "sh", "-c", "kill -15 $$"); code != 143 {
		g.t.Errorf("a signal gave %d", code)
	}
	if out, _, code := g.exec("e", "big", "sh", "-c", "yes 0123456789abcdef | head -c 3000000"); len(out) != 3000000 || code != 0 {
		g.t.Errorf("%d bytes, code %d", len(out), code)
	}
	at = time.Now()
	_, err := g.StartProcess(g.ctx, &agentapi.StartProcessRequest{ContainerId: "e", ExecId: "x3", Process: []byte(`{"args":["nope"],"cwd":"/","env":["PATH=/bin"]}`)})
	if !errdefs.IsNotFound(err) || time.Since(at) > 5*time.Second {
		g.t.Errorf("after %v: %v", time.Since(at), err)
	}
	g.t.Log(err)
	if out, _, _ := g.exec("e", "adj", "cat", "/proc/self/oom_score_adj"); out != "0\n" {
		g.t.Errorf("an exec's oom_score_adj is %q", out)
	}
	if out, _, _ := g.exec("e", "ps", "ps"); !strings.Contains(out, "sleep 1000") {
		g.t.Errorf("ps: %q", out)
	}
	for rec, err := range g.Exits(g.ctx, 0) {
		if err != nil {
			g.t.Fatal(err)
		}
		if rec.ExecId == "x2" {
			break
		}
	}
	g.remove("e")
}

func testTerminal(g guestOps) {
	g.create("tty", ociSpec("sh", "-c", "stty size; read line; echo got $line; stty size; exit 4"), func(r *agentapi.CreateContainerRequest) { r.Tty, r.Stdin = true, true })
	if _, err := g.ResizeTerminal(g.ctx, &agentapi.ResizeTerminalRequest{ContainerId: "tty", Width: 111, Height: 33}); err != nil {
		g.t.Error(err)
	}
	out, err := g.Stdout(g.ctx, "tty", "")
	if err != nil {
		g.t.Fatal(err)
	}
	g.start("tty")
	if _, err := g.ResizeTerminal(g.ctx, &agentapi.ResizeTerminalRequest{ContainerId: "tty", Width: 90, Height: 20}); err != nil {
		g.t.Error(err)
	}
	in, err := g.Stdin(g.ctx, "tty", "")
	if err != nil {
		g.t.Fatal(err)
	}
	io.WriteString(in, "hello\n")
	b, err := io.ReadAll(out)
	if err != nil || !strings.Contains(string(b), "got hello\r\n20 90\r\n") {
		g.t.Errorf("terminal: %q, %v", b, err)
	}
	if exit := g.wait("tty", ""); exit.ExitCode != 4 {
		g.t.Errorf("exit %v", exit)
	}
	if log := g.logs("tty"); !strings.Contains(log, "got hello") {
		g.t.Errorf("log %q", log)
	}
	g.remove("tty")
}

// treeTar is a kubelet's volume directory.
func treeTar(t *testing.T, stamp string, files map[string]string, plain map[string]string) io.Reader {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h *tar.Header, data string) {
		h.Size = int64(len(data))
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, data)
	}
	add(&tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755}, "")
	if stamp != "" {
		add(&tar.Header{Name: stamp + "/", Typeflag: tar.TypeDir, Mode: 0o755}, "")
		add(&tar.Header{Name: "..data", Typeflag: tar.TypeSymlink, Linkname: stamp, Mode: 0o777}, "")
	}
	for name, text := range files {
		add(&tar.Header{Name: stamp + "/" + name, Typeflag: tar.TypeReg, Mode: 0o644}, text)
		add(&tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: "..data/" + name, Mode: 0o777}, "")
	}
	for name, text := range plain {
		add(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644}, text)
	}
	w.Close()
	return &b
}

func testVolumes(g guestOps) {
	for _, r := range []*agentapi.AddVolumeRequest{
		{Id: "empty", Kind: agentapi.AddVolumeRequest_EMPTY_DIR, HasFsGroup: true, FsGroup: 2000},
		{Id: "mem", Kind: agentapi.AddVolumeRequest_TMPFS, SizeLimit: 1 << 20},
		{Id: "conf", Kind: agentapi.AddVolumeRequest_TREE},
		{Id: "hosts", Kind: agentapi.AddVolumeRequest_TREE},
	} {
		for range 2 {
			if _, err := g.AddVolume(g.ctx, r); err != nil {
				g.t.Fatal(err)
			}
		}
	}
	put := func(volume string, r io.Reader) {
		g.t.Helper()
		if err := g.PutTree(g.ctx, volume, r); err != nil {
			g.t.Fatal(err)
		}
	}
	put("conf", treeTar(g.t, "..2026_1", map[string]string{"a": "one", "b": "bee"}, nil))
	put("hosts", treeTar(g.t, "", nil, map[string]string{"etc-hosts": "127.0.0.1 localhost\n"}))
	g.create("vol", ociSpec("sleep", "1000"), func(r *agentapi.CreateContainerRequest) {
		r.Mounts = []*agentapi.VolumeMount{
			{Volume: "empty", Destination: "/empty"}, {Volume: "empty", Destination: "/sub", SubPath: "x/y"},
			{Volume: "mem", Destination: "/mem"}, {Volume: "conf", Destination: "/conf", ReadOnly: true},
			{Volume: "conf", Destination: "/one-file", SubPath: "a", ReadOnly: true}, {Volume: "hosts", Destination: "/etc/hosts", SubPath: "etc-hosts"},
		}
	})
	g.start("vol")
	sh := func(script, want string) {
		g.t.Helper()
		if out, errs, _ := g.exec("vol", "s"+time.Now().Format("150405.000000000"), "sh", "-c", script); out != want {
			g.t.Errorf("%s: got %q %q, want %q", script, out, errs, want)
		}
	}
	sh("stat -c '%a %g' /empty /sub; touch /sub/f; ls /empty/x/y", "2777 2000\n2777 2000\nf\n")
	sh("cat /conf/a /conf/b /one-file; readlink /conf/..data", "onebeeone..2026_1\n")
	sh("cat /etc/hosts", "127.0.0.1 localhost\n")
	sh("dd if=/dev/zero of=/mem/big bs=1M count=2 2>/dev/null; stat -c %s /mem/big; touch /conf/x 2>/dev/null || echo ro", "1048576\nro\n")
	put("conf", treeTar(g.t, "..2026_2", map[string]string{"a": "two", "c": "sea"}, nil))
	put("hosts", treeTar(g.t, "", nil, map[string]string{"etc-hosts": "127.0.0.1 localhost more\n"}))
	sh("cat /conf/a /conf/c /one-file; ls -A /conf", "twoseaone..2026_2\n..data\na\nc\n")
	sh("cat /etc/hosts", "127.0.0.1 localhost more\n")

	if _, err := g.RemoveVolume(g.ctx, &agentapi.RemoveVolumeRequest{Id: "empty"}); !errdefs.IsFailedPrecondition(err) {
		g.t.Errorf("a volume in use: %v", err)
	}
	stats, err := g.Stats(g.ctx, &agentapi.StatsRequest{})
	if err != nil {
		g.t.Fatal(err)
	}
	if len(stats.Containers) != 1 || stats.Containers[0].MemoryCurrent == 0 || stats.Containers[0].CpuUsageNs == 0 || stats.Containers[0].Pids == 0 {
		g.t.Errorf("container stats %v", stats.Containers)
	}
	if stats.Ephemeral.CapacityBytes < 900<<20 || stats.Ephemeral.UsedBytes == 0 || stats.Ephemeral.UsedBytes > 20<<20 || stats.MemoryTotal == 0 || len(stats.Networks) != 1 || len(stats.Volumes) != 4 || stats.Guest.CpuUsageNs == 0 {
		g.t.Errorf("stats %v", stats)
	}
	limit := int64(32 << 20)
	if _, err := g.UpdateContainer(g.ctx, &agentapi.UpdateContainerRequest{Id: "vol", Resources: mustJSON(g.t, &specs.LinuxResources{Memory: limits(limit)}), Unified: map[string]string{"pids.max": "77"}}); err == nil {
		sh("cat /sys/fs/cgroup/pids.max", "77\n")
	} else {
		g.t.Error(err)
	}
	g.remove("vol")
	for _, id := range []string{"empty", "mem", "conf", "hosts", "conf"} {
		if _, err := g.RemoveVolume(g.ctx, &agentapi.RemoveVolumeRequest{Id: id}); err != nil {
			g.t.Error(err)
		}
	}
}

func testStdin(g guestOps) {
	g.create("in", ociSpec("sh", "-c", "while read l; do echo got $l; done; echo end"), func(r *agentapi.CreateContainerRequest) { r.Stdin, r.StdinOnce = true, true })
	g.start("in")
	in, err := g.Stdin(g.ctx, "in", "")
	if err != nil {
		g.t.Fatal(err)
	}
	io.WriteString(in, "a\nb\n")
	in.Close()
	if exit := g.wait("in", ""); exit.ExitCode != 0 {
		g.t.Errorf("exit %v", exit)
	}
	if log := g.logs("in"); log != "got a\ngot b\nend\n" {
		g.t.Errorf("log %q", log)
	}
	g.remove("in")
}

func testPortForward(g guestOps) {
	g.create("nc", ociSpec("sh", "-c", "echo listening; nc -l -p 8080 | tr a-z A-Z; echo done"), nil)
	g.start("nc")
	for range g.Logs(g.ctx, "nc", 1) {
		break
	}
	conn, err := g.PortForward(g.ctx, 8080)
	for end := time.Now().Add(time.Minute); err != nil && time.Now().Before(end); {
		time.Sleep(50 * time.Millisecond) // nc binds behind the echo
		conn, err = g.PortForward(g.ctx, 8080)
	}
	if err != nil {
		g.t.Fatalf("%v; the listener said %q", err, g.logs("nc"))
	}
	io.WriteString(conn, "through the port\n")
	conn.(*agentapi.Stream).CloseWrite()
	io.Copy(io.Discard, conn)
	conn.Close()
	g.wait("nc", "")
	if log := g.logs("nc"); !strings.Contains(log, "THROUGH THE PORT\ndone") {
		g.t.Errorf("log %q", log)
	}
	if _, err := g.PortForward(g.ctx, 9); !errdefs.IsUnavailable(err) {
		g.t.Errorf("nothing listens: %v", err)
	}
	g.remove("nc")
}

// testReattach leaves the session in the middle of everything and takes up
// what the container did meanwhile.
func testReattach(vm *testVM, g guestOps) *agentapi.Client {
	g.create("on", ociSpec("sh", "-c", "i=0; while [ $i -lt 40 ]; do echo line $i; i=$((i+1)); sleep 0.05; done; exit 5"), nil)
	g.start("on")
	seen := uint64(0)
	for rec := range g.Logs(g.ctx, "on", 1) {
		if seen = rec.Offset; seen == 5 {
			break
		}
	}
	out, _ := g.Stdout(g.ctx, "on", "")
	g.Client.Close()
	if _, err := io.ReadAll(out); !errdefs.IsUnavailable(err) {
		g.t.Errorf("the stream of a closed session: %v", err)
	}
	// A host that dies in the middle of a frame.
	conn := vm.dial()
	conn.Write([]byte("\xf5atoll-resync\xfe\n\x01 half a mark"))
	conn.Close()
	at := time.Now()
	g.Client = vm.attach()
	g.t.Logf("re-attach: %v", time.Since(at).Round(time.Millisecond))
	hello, err := g.Hello(g.ctx, &agentapi.HelloRequest{})
	if err != nil || !hello.SandboxReady || len(hello.Containers) != 1 {
		g.t.Fatalf("%v, %v", hello, err)
	}
	var lines []string
	for rec, err := range g.Logs(g.ctx, "on", seen+1) {
		if err != nil {
			g.t.Fatal(err)
		}
		if !rec.Eof {
			lines = append(lines, string(rec.Line))
		}
	}
	if len(lines) != 35 || lines[0] != "line 5" || lines[34] != "line 39" {
		g.t.Errorf("%d lines: %v", len(lines), lines)
	}
	if exit := g.wait("on", ""); exit.ExitCode != 5 {
		g.t.Errorf("exit %v", exit)
	}
	g.remove("on")
	return g.Client
}

// testNothingLeft looks into the guest for what containers left.
func testNothingLeft(vm *testVM, g guestOps) {
	hello, err := g.Hello(g.ctx, &agentapi.HelloRequest{})
	if err != nil || len(hello.Containers) != 0 {
		g.t.Errorf("%v, %v", hello, err)
	}
	if strings.Contains(vm.console.String(), "level=ERROR") {
		g.t.Error("the agent logged an error")
	}
}
