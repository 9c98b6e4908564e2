package controlplane

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// The tests run in a network namespace of their own, in which the control
// plane's address is on a bridge as `atoll up` makes it; the control plane
// itself is this binary once more.
const (
	roleEnv      = "ATOLL_CONTROLPLANE_TEST_ROLE"
	roleIsolated = "isolated"
	roleServer   = "server"
)

func TestMain(m *testing.M) {
	switch os.Getenv(roleEnv) {
	case roleServer:
		os.Exit(serve())
	case roleKeeper:
		os.Exit(keeperMain())
	case roleVolumes:
		os.Exit(volumesMain())
	case roleGovc:
		os.Exit(govcMain())
	case roleIsolated:
		if err := makeLinks(); err != nil {
			fmt.Fprintln(os.Stderr, "network of the tests:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	if os.Getuid() != 0 {
		os.Exit(m.Run()) // the tests that need the namespace skip
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), roleEnv+"="+roleIsolated)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, "network namespace for the tests:", err)
		os.Exit(1)
	}
	os.Exit(cmd.ProcessState.ExitCode())
}

func makeLinks() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "atoll0"}}
	if err := netlink.LinkAdd(bridge); err != nil {
		return err
	}
	addr, err := netlink.ParseAddr("198.18.0.1/18")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(bridge, addr); err != nil {
		return err
	}
	return netlink.LinkSetUp(bridge)
}

// serve is the control plane's process: its configuration comes on standard
// input, phases go to standard output.
func serve() int {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	var cfg Config
	if err := json.NewDecoder(os.Stdin).Decode(&cfg); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	keepNamespaces, keepVolumes = os.Getenv(noKeeperEnv) == "", os.Getenv(noVolumesEnv) == ""
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	out := json.NewEncoder(os.Stdout)
	if err := Run(ctx, cfg, func(p Phase) { _ = out.Encode(p) }); err != nil {
		fmt.Fprintln(os.Stderr, "RUN:", err)
		return 1
	}
	return 0
}

// A server is a control plane's process.
type server struct {
	cmd     *exec.Cmd
	cfg     Config
	phases  []Phase
	started time.Duration
}

// startServer returns when the control plane is ready.
func startServer(t *testing.T, cfg Config) *server {
	t.Helper()
	s, err := tryServer(cfg)
	if err != nil {
		log, _ := os.ReadFile(cfg.DataDir + ".log")
		if len(log) > 6000 {
			log = log[len(log)-6000:]
		}
		t.Fatalf("control plane: %v\n%s", err, log)
	}
	t.Cleanup(func() {
		s.cmd.Process.Kill()
		s.cmd.Wait()
		if keep := os.Getenv("ATOLL_TEST_LOG"); keep != "" {
			b, _ := os.ReadFile(cfg.DataDir + ".log")
			os.WriteFile(keep, b, 0o600)
		}
	})
	return s
}

func tryServer(cfg Config) (*server, error) {
	log, err := os.OpenFile(cfg.DataDir+".log", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	in, err := json.Marshal(cfg)
	if err != nil {
		return nil, err
	}
	s := &server{cfg: cfg, cmd: exec.Command("/proc/self/exe")}
	s.cmd.Env = append(os.Environ(), roleEnv+"="+roleServer)
	s.cmd.Stdin = strings.NewReader(string(in))
	s.cmd.Stderr = log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	began := time.Now()
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var p Phase
		if err := json.Unmarshal(lines.Bytes(), &p); err != nil {
			continue // klog and others may write to standard output
		}
		s.phases = append(s.phases, p)
		if p.Name == PhaseReady {
			s.started = time.Since(began)
			go func() {
				for lines.Scan() { // keeps the pipe empty
				}
			}()
			return s, nil
		}
	}
	return nil, fmt.Errorf("ended before it was ready: %v", s.cmd.Wait())
}

// stop sends SIGTERM and returns how long the end took.
func (s *server) stop(t *testing.T) time.Duration {
	t.Helper()
	began := time.Now()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Wait(); err != nil {
		t.Fatalf("stop: %v", err)
	}
	return time.Since(began)
}

func (s *server) kill(t *testing.T) {
	t.Helper()
	if err := s.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	s.cmd.Wait()
}

// rss is the resident memory in MiB.
func (s *server) rss(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[0] == "VmRSS:" {
			kb, _ := strconv.Atoi(f[1])
			return kb >> 10
		}
	}
	return 0
}

func testConfig(t *testing.T) Config {
	t.Helper()
	if os.Getenv(roleEnv) != roleIsolated {
		t.Skip("needs root for a network namespace")
	}
	cfg := Default(t.TempDir())
	// t.TempDir is too long for a socket's path.
	run, err := os.MkdirTemp("", "atoll-run-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(run) })
	cfg.RunDir = run
	cfg.Address = netip.MustParseAddr("198.18.0.1")
	return cfg
}

func restFrom(t *testing.T, kubeconfig string) *rest.Config {
	t.Helper()
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	cfg.QPS = -1
	return cfg
}

func clientFrom(t *testing.T, cfg *rest.Config) *kubernetes.Clientset {
	t.Helper()
	c, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// eventually retries f for up to a minute: a machine may be slow, and only a
// test that fails waits for so long.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}
