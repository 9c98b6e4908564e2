package crashmatrix

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/netplugin/tap"
	"github.com/openatoll/atoll/vmpod"
)

const (
	nodeIP  = "198.18.0.1"
	podCIDR = "198.19.0.0/24"

	// patience is for what takes a moment on an idle machine, on one that is
	// not. Nothing is measured by it.
	patience = 90 * time.Second
	// rpcTimeout bounds one call.
	rpcTimeout = 60 * time.Second
)

// A node is `spherelet cri` on directories of its own, started again and
// again.
type node struct {
	dir, data, run, config string
	guest                  string
	spherelet              string
	log                    *os.File

	cmd   *exec.Cmd
	ended chan struct{} // closed when cmd has
	conn  *grpc.ClientConn
	csi   *grpc.ClientConn
	rt    runtimeapi.RuntimeServiceClient
	img   runtimeapi.ImageServiceClient

	// volumes are those that must be there, by name; passing are being made or
	// deleted.
	volumes map[string]*csiVolume
	passing map[string]bool
	// keptRounds is how many values the volume that is kept has at least.
	keptRounds int
}

// newNode makes directories and configuration; there is no daemon yet.
func newNode(t *testing.T, spherelet string) *node {
	t.Helper()
	if err := tap.EnsureNodeLink(t.Context(), "atoll0", []netip.Prefix{netip.MustParsePrefix(nodeIP + "/32")}); err != nil {
		t.Fatal(err)
	}
	guest, err := filepath.Abs("../../build/guest")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(guest); err != nil {
		t.Skipf("needs a guest (make guest): %v", err)
	}
	dir, err := os.MkdirTemp("/var/tmp", "atoll-matrix-")
	if err != nil {
		t.Fatal(err)
	}
	n := &node{dir: dir, data: filepath.Join(dir, "data"), run: fmt.Sprintf("/run/atoll/matrix-%d", os.Getpid()), config: filepath.Join(dir, "config.json"), spherelet: spherelet,
		volumes: map[string]*csiVolume{}, passing: map[string]bool{}}
	t.Cleanup(func() { n.destroy(t) })
	n.guest = guest
	err = os.Chmod(dir, 0o711) // QEMU runs as another user
	if err == nil {
		err = os.MkdirAll("../../build", 0o755)
	}
	if err == nil {
		n.log, err = os.Create("../../build/crash-matrix.log")
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// configure writes the configuration. VMs are cloned only where that is what
// is looked at: boots are more of a kind.
func (n *node) configure(arm string) error {
	warm := 0
	if strings.Contains(arm, "warm") {
		warm = 1
	}
	text, err := json.MarshalIndent(map[string]any{
		"apiVersion": "atoll.dev/v1alpha1", "kind": "SphereletConfiguration", "nodeName": "matrix", "nodeIP": nodeIP,
		"dataDir": n.data, "runDir": n.run, "kubeProxy": false, "clusterCIDR": "198.19.0.0/16",
		"hypervisor": map[string]any{"guest": n.guest, "ephemeralDefault": "64Mi"},
		"templates":  map[string]any{"enabled": clones(arm), "warm": warm},
	}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(n.config, text, 0o600)
}

// clones says whether a point is met only by a daemon that clones.
func clones(point string) bool {
	return slices.ContainsFunc([]string{"qemu/template/", "qemu/warm/", "qemu/clone/"}, func(p string) bool { return strings.HasPrefix(point, p) })
}

// start runs the daemon with a failpoint armed, or none, and returns when it
// answers. died says that it ended before that.
func (n *node) start(arm string) (died bool, err error) {
	if err := n.configure(arm); err != nil {
		return false, err
	}
	fmt.Fprintf(n.log, "--- start %s\n", arm)
	n.cmd = exec.Command(n.spherelet, "cri", "--config", n.config, "--pod-cidr", podCIDR, "--kubelet-root", n.kubelet())
	n.cmd.Stdout, n.cmd.Stderr = n.log, n.log
	n.cmd.Env = append(os.Environ(), "ATOLL_FAILPOINT="+arm)
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := n.cmd.Start(); err != nil {
		return false, err
	}
	cmd, ended := n.cmd, make(chan struct{})
	n.ended = ended
	go func() { _ = cmd.Wait(); close(ended) }()
	// A channel of our own: what gRPC remembers of a dead daemon would delay us.
	n.conn, err = grpc.NewClient("unix://"+filepath.Join(n.run, "cri.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return false, err
	}
	if n.csi, err = grpc.NewClient("unix://"+filepath.Join(n.run, "csi.sock"), grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		return false, err
	}
	n.rt, n.img = runtimeapi.NewRuntimeServiceClient(n.conn), runtimeapi.NewImageServiceClient(n.conn)
	deadline := time.After(patience)
	for {
		if n.answers() {
			return false, nil
		}
		select {
		case <-n.ended:
			return true, nil
		case <-deadline:
			return false, fmt.Errorf("the daemon does not answer after %s: see build/crash-matrix.log", patience)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// answers says whether the daemon serves. To connect proves nothing: a child of
// the dead one, killed between fork and exec, holds its socket a moment longer.
func (n *node) answers() bool {
	c, err := net.Dial("unix", filepath.Join(n.run, "cri.sock"))
	if err != nil {
		return false // gRPC would remember it, and wait
	}
	c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	_, err = n.rt.Version(ctx, &runtimeapi.VersionRequest{})
	return err == nil
}

func (n *node) kubelet() string { return filepath.Join(n.dir, "kubelet") }

// awaitDeath waits until the daemon has died of its failpoint.
func (n *node) awaitDeath(v visit, within time.Duration) error {
	select {
	case <-n.ended:
	case <-time.After(within):
		return fmt.Errorf("%s was not hit", v.point)
	}
	n.hangUp()
	status, _ := n.cmd.ProcessState.Sys().(syscall.WaitStatus)
	said := n.tail()
	if !status.Signaled() || status.Signal() != syscall.SIGKILL || !strings.Contains(said, fmt.Sprintf("failpoint %s: kill", v.point)) {
		return fmt.Errorf("the daemon ended by itself (%s), not at %s:\n%s", n.cmd.ProcessState, v.point, said)
	}
	n.cmd = nil
	return nil
}

// tail is what the daemon said since its start.
func (n *node) tail() string {
	b, err := os.ReadFile(n.log.Name())
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, bytes.LastIndex(b, []byte("--- start "))):])
}

// kill ends the daemon without a word.
func (n *node) kill() {
	if n.cmd == nil {
		return
	}
	_ = n.cmd.Process.Kill()
	<-n.ended
	n.hangUp()
	n.cmd = nil
}

func (n *node) hangUp() {
	n.conn.Close()
	n.csi.Close()
}

// destroy removes everything.
func (n *node) destroy(t *testing.T) {
	n.kill()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if said, err := exec.CommandContext(ctx, n.spherelet, "cleanup", "--config", n.config).CombinedOutput(); err != nil {
		t.Errorf("spherelet cleanup: %v\n%s", err, said)
	}
	if n.log != nil {
		n.log.Close()
	}
	if err := os.RemoveAll(n.dir); err != nil {
		t.Error(err)
	}
}

// hint plays the kubelet's part in a pod's admission.
func (n *node) hint(ctx context.Context, path string, hint *vmpod.Hint) error {
	var body bytes.Buffer
	if hint != nil {
		if err := json.NewEncoder(&body).Encode(hint); err != nil {
			return err
		}
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(n.run, "hints.sock"))
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://node"+path, &body)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", path, resp.Status)
	}
	return nil
}
