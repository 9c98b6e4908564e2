package podinit

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/openatoll/atoll/vmpod/agentapi"
	"github.com/openatoll/atoll/vmpod/guestimage"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// A testVM is one booted guest.
type testVM struct {
	t       *testing.T
	socket  string
	monitor string
	console *lockedBuffer
	dir     string
	image   string
	pid     int
	cmd     *exec.Cmd
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func need(t *testing.T, program, pkg string) string {
	t.Helper()
	p, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("%s is not installed (apt-get install %s)", program, pkg)
	}
	return p
}

func run1(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// buildGuest builds podinit and the guest around it, once a test process.
var buildGuest = sync.OnceValues(func() (guestimage.Guest, error) {
	dir, err := os.MkdirTemp("", "podinit-guest-*")
	if err != nil {
		return guestimage.Guest{}, err
	}
	guestDir = dir
	init := filepath.Join(dir, "podinit")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", init, "../../cmd/podinit")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return guestimage.Guest{}, fmt.Errorf("%v: %s", err, out)
	}
	flavour := os.Getenv("ATOLL_TEST_KERNEL") // stock (the default) or tuned
	if flavour == "" {
		flavour = guestimage.FlavourStock
	}
	tuned, err := filepath.Abs("../../build/guest-kernel")
	if err != nil {
		return guestimage.Guest{}, err
	}
	return guestimage.Build(context.Background(), guestimage.Options{
		Out: filepath.Join(dir, "guest"), Kernel: flavour, Podinit: init, TunedDir: tuned, CrunDir: filepath.Join(filepath.Dir(tuned), "guest-crun"),
	})
})

var guestDir string

func TestMain(m *testing.M) {
	code := m.Run()
	if guestDir != "" {
		os.RemoveAll(guestDir)
	}
	os.Exit(code)
}

// busyboxImage makes an image disk of busybox and some traps.
func busyboxImage(t *testing.T, dir string) string {
	t.Helper()
	need(t, "mkfs.erofs", "erofs-utils")
	busybox := need(t, "busybox", "busybox-static")
	root := filepath.Join(dir, "image")
	for _, d := range []string{"bin", "etc", "tmp", "data", "proc", "dev", "sys"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	os.Chmod(filepath.Join(root, "tmp"), os.ModeSticky|0o777)
	b, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "bin/busybox"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"sh", "cat", "echo", "sleep", "ls", "id", "true", "dd", "tail", "stty", "hostname", "nc", "kill", "stat", "ps", "yes", "head", "od", "mount", "date", "readlink", "ip", "tr", "touch"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
			t.Fatal(err)
		}
	}
	os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("root:x:0:0::/:/bin/sh\n"), 0o644)
	os.WriteFile(filepath.Join(root, "etc/machine-id"), nil, 0o644)
	os.Symlink("/etc/shadow-of-the-guest", filepath.Join(root, "escape"))
	os.Symlink("../../../../etc/passwd", filepath.Join(root, "inside"))
	image := filepath.Join(dir, "image.erofs")
	run1(t, "mkfs.erofs", "-T0", image, root)
	return image
}

// bootVM boots a guest with an image disk "img", an ephemeral disk "eph" and
// a NIC that leads nowhere.
func bootVM(t *testing.T, extra ...string) *testVM {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a VM")
	}
	need(t, "qemu-system-x86_64", "qemu-system-x86")
	g, err := buildGuest()
	if err != nil {
		t.Fatal(err)
	}
	vm := newVM(t)
	eph := ephemeralDisk(t, vm.dir, g)
	vm.image = busyboxImage(t, vm.dir)
	vm.start(append([]string{"-m", "256",
		"-kernel", g.Kernel, "-initrd", g.Initrd,
		"-append", testCmdline + g.Cmdline,
		"-drive", "if=none,id=img,format=raw,read-only=on,file=" + vm.image, "-device", "virtio-blk-pci,drive=img,serial=img",
		"-drive", "if=none,id=eph,format=raw,discard=unmap,file=" + eph, "-device", "virtio-blk-pci,drive=eph,serial=eph",
		"-device", "pcie-root-port,id=rp0,slot=1,chassis=1",
		"-netdev", "hubport,id=net0,hubid=0", "-device", "virtio-net-pci,netdev=net0,mac=02:00:00:00:00:01,romfile=",
	}, extra...))
	return vm
}

// testCmdline is what every kernel is told here.
const testCmdline = "console=ttyS0 panic=-1 quiet no_timer_check random.trust_cpu=on "

func newVM(t *testing.T) *testVM {
	dir := t.TempDir()
	return &testVM{t: t, socket: filepath.Join(dir, "agent.sock"), monitor: filepath.Join(dir, "mon.sock"), console: &lockedBuffer{}, dir: dir}
}

// ephemeralDisk makes a pod's writable disk.
func ephemeralDisk(t *testing.T, dir string, g guestimage.Guest) string {
	eph := filepath.Join(dir, "eph.img")
	if err := os.WriteFile(eph, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	os.Truncate(eph, 1<<30)
	features, extended := "^has_journal", "lazy_itable_init=1,nodiscard"
	if g.Quota {
		features, extended = features+",quota,project", extended+",quotatype=prjquota"
	}
	run1(t, "mkfs.ext4", "-q", "-O", features, "-E", extended, eph)
	return eph
}

// start runs QEMU.
func (vm *testVM) start(extra []string) {
	t := vm.t
	args := append([]string{"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35,accel=tcg,sata=off,smbus=off", "-cpu", "max",
		"-serial", "stdio", "-monitor", "unix:" + vm.monitor + ",server=on,wait=off",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=agent,path=" + vm.socket + ",server=on,wait=off",
		"-device", "virtserialport,chardev=agent,name=atoll.agent",
	}, extra...)
	cmd := exec.Command("qemu-system-x86_64", args...)
	cmd.Stdout, cmd.Stderr = vm.console, vm.console
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // a test that times out cleans nothing up
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	vm.pid, vm.cmd = cmd.Process.Pid, cmd
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s\nconsole:\n%s", strings.Join(cmd.Args, " "), vm.console)
		}
	})
}

func (vm *testVM) dial() net.Conn {
	vm.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		conn, err := net.Dial("unix", vm.socket)
		if err == nil {
			return conn
		}
		if time.Now().After(end) {
			vm.t.Fatal(err)
		}
	}
}

// command gives QEMU's monitor one command and returns what it said.
func (vm *testVM) command(line string) string {
	vm.t.Helper()
	conn, err := net.Dial("unix", vm.monitor)
	if err != nil {
		vm.t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	fmt.Fprintln(conn, line)
	said := ""
	for b := make([]byte, 4096); strings.Count(said, "(qemu)") < 2; {
		n, err := conn.Read(b)
		if err != nil {
			vm.t.Fatalf("%s: %q, %v", line, said, err)
		}
		said += string(b[:n])
	}
	if strings.Contains(said, "Error") {
		vm.t.Fatalf("%s: %s", line, said)
	}
	return said
}

// end ends QEMU.
func (vm *testVM) end() {
	vm.cmd.Process.Kill()
	vm.cmd.Wait()
}

// settle waits until the guest has nothing to do.
func (vm *testVM) settle() {
	for calm := 0; calm < 3; {
		before := vm.cpuTime()
		time.Sleep(100 * time.Millisecond)
		if calm++; vm.cpuTime() > before+10*time.Millisecond {
			calm = 0
		}
	}
}

// cpuTime is what QEMU has used so far.
func (vm *testVM) cpuTime() time.Duration {
	vm.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", vm.pid))
	if err != nil {
		vm.t.Fatal(err)
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100
}

func (vm *testVM) attach() *agentapi.Client {
	vm.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c, err := agentapi.Attach(ctx, vm.dial())
	if err != nil {
		vm.t.Fatal(err)
	}
	vm.t.Cleanup(func() { c.Close() })
	return c
}

// setupRequest is the sandbox of every test.
func setupRequest() *agentapi.SetupSandboxRequest {
	entropy := make([]byte, 64)
	rand.Read(entropy)
	return &agentapi.SetupSandboxRequest{
		ClockNs: time.Now().UnixNano(), Entropy: entropy, Hostname: "pod-1", MachineId: strings.Repeat("0a", 16), PodUid: "uid-1", VmUuid: "0b0b0b0b-0c0c-4d0d-8e0e-0f0f0f0f0f0f",
		Interfaces: []*agentapi.Interface{{Mac: "02:00:00:00:00:01", Name: "eth0", Mtu: 1400, Addresses: []string{"198.19.0.7/32"},
			Routes: []*agentapi.Route{{Destination: "169.254.1.1/32"}, {Destination: "0.0.0.0/0", Gateway: "169.254.1.1"}}}},
		Dns:     &agentapi.DNS{Servers: []string{"198.18.64.10"}, Searches: []string{"default.svc.cluster.local"}, Options: []string{"ndots:5"}},
		Sysctls: map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}, EphemeralDisk: "eph",
	}
}

// ociSpec is what a CRI implementation would send for a command.
func ociSpec(args ...string) *specs.Spec {
	caps := []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE"}
	return &specs.Spec{
		Version: "1.0.2",
		Process: &specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}, NoNewPrivileges: true,
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
			Rlimits:      []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 1024, Soft: 1024}}},
		Root: &specs.Root{},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
		},
		Linux: &specs.Linux{
			Namespaces:    []specs.LinuxNamespace{{Type: "pid"}, {Type: "ipc"}, {Type: "uts"}, {Type: "mount"}, {Type: "network"}, {Type: "cgroup"}},
			MaskedPaths:   []string{"/proc/kcore", "/proc/keys"},
			ReadonlyPaths: []string{"/proc/sys", "/proc/sysrq-trigger"},
			Resources:     &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}},
			Seccomp: &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86_64},
				Syscalls: []specs.LinuxSyscall{{Names: []string{"kexec_load", "init_module"}, Action: specs.ActErrno}}},
		},
	}
}

// guestOps adds what every test does to a Client.
type guestOps struct {
	*agentapi.Client
	t   *testing.T
	ctx context.Context
}

func (g guestOps) create(id string, spec *specs.Spec, change func(*agentapi.CreateContainerRequest)) {
	g.t.Helper()
	b, err := json.Marshal(spec)
	if err != nil {
		g.t.Fatal(err)
	}
	r := &agentapi.CreateContainerRequest{Id: id, Spec: b, ImageDisk: "img", TerminationMessagePath: "/dev/termination-log"}
	if change != nil {
		change(r)
	}
	if _, err := g.CreateContainer(g.ctx, r); err != nil {
		g.t.Fatal(err)
	}
}

func (g guestOps) start(id string) {
	g.t.Helper()
	if _, err := g.StartProcess(g.ctx, &agentapi.StartProcessRequest{ContainerId: id}); err != nil {
		g.t.Fatal(err)
	}
}

func (g guestOps) wait(id, exec string) *agentapi.ExitRecord {
	g.t.Helper()
	r, err := g.WaitProcess(g.ctx, &agentapi.WaitProcessRequest{ContainerId: id, ExecId: exec})
	if err != nil {
		g.t.Fatal(err)
	}
	return r.Exit
}

func (g guestOps) remove(id string) {
	g.t.Helper()
	if _, err := g.RemoveContainer(g.ctx, &agentapi.RemoveContainerRequest{Id: id}); err != nil {
		g.t.Fatal(err)
	}
}

// logs reads a container's log to its end.
func (g guestOps) logs(id string) string {
	g.t.Helper()
	var b strings.Builder
	for rec, err := range g.Logs(g.ctx, id, 0) {
		if err != nil {
			g.t.Fatal(err)
		}
		if !rec.Eof {
			fmt.Fprintf(&b, "%s\n", rec.Line)
		}
	}
	return b.String()
}

// exec runs a command to its end.
func (g guestOps) exec(container, id string, args ...string) (stdout, stderr string, code int32) {
	g.t.Helper()
	p, _ := json.Marshal(&specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}})
	if _, err := g.StartProcess(g.ctx, &agentapi.StartProcessRequest{ContainerId: container, ExecId: id, Process: p}); err != nil {
		g.t.Fatal(err)
	}
	var out [2][]byte
	var wg sync.WaitGroup
	for i, open := range []func(context.Context, string, string) (io.ReadCloser, error){g.Stdout, g.Stderr} {
		wg.Add(1)
		go func() {
			defer wg.Done()
			r, err := open(g.ctx, container, id)
			if err == nil {
				defer r.Close()
				out[i], err = io.ReadAll(r)
			}
			if err != nil {
				g.t.Error(err)
			}
		}()
	}
	code = g.wait(container, id).ExitCode
	wg.Wait()
	return string(out[0]), string(out[1]), code
}

// run runs a container to its end and removes it.
func (g guestOps) run(id string, spec *specs.Spec, change func(*agentapi.CreateContainerRequest)) (string, *agentapi.ExitRecord) {
	g.t.Helper()
	g.create(id, spec, change)
	g.start(id)
	exit := g.wait(id, "")
	out := g.logs(id)
	g.remove(id)
	return out, exit
}
