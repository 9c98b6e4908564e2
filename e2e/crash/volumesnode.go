package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// Addresses of the two nodes: the first is what `atoll up --isolated` gives.
const (
	firstIP  = "198.18.0.1"
	secondIP = "198.18.0.2"
	// secondName is the second node.
	secondName = "crash-b"
	// sharedPolicy is of volumes in the datastore that both nodes have.
	sharedPolicy = "crash-shared"
)

func secondLog(work string) string { return filepath.Join(work, "second.log") }
func sharedDir(work string) string { return filepath.Join(work, "shared") }

// sharedDatastore is that datastore in a node's configuration.
func sharedDatastore(work string) map[string]any {
	return map[string]any{"name": "shared", "path": sharedDir(work), "shared": true, "policies": []any{map[string]any{"name": sharedPolicy}}}
}

// share adds the shared datastore to the configuration of the first node, whose
// spherelet must be started again for it.
func share(file, work string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var config map[string]any
	if err := yaml.Unmarshal(text, &config); err != nil {
		return err
	}
	own := map[string]any{"name": "local", "path": filepath.Join(config["dataDir"].(string), "volumes"), "policies": []any{map[string]any{"name": "atoll-local"}}}
	config["storage"] = map[string]any{"datastores": []any{own, sharedDatastore(work)}}
	if text, err = yaml.Marshal(config); err != nil {
		return err
	}
	return os.WriteFile(file, text, 0o600)
}

// A secondNode is a spherelet in a network namespace of its own.
type secondNode struct {
	*agent
	netns, link string
	config      string
	runDir      string
	dataDir     string
}

// newSecondNode makes the network and the configuration; start joins it.
func newSecondNode(t *volumesTrial) (*secondNode, error) {
	id, dataDir := os.Getpid(), filepath.Join(t.o.Work, "second")
	instance := sha256.Sum256([]byte(dataDir)) // as spherelet calls what is this directory's
	n := &secondNode{
		netns: fmt.Sprintf("crash-b-%d", id), link: fmt.Sprintf("crashb%d", id%1e8), config: filepath.Join(t.o.Work, "second.yaml"),
		runDir: "/run/atoll/" + hex.EncodeToString(instance[:4]), dataDir: dataDir,
	}
	registry, err := t.serveRegistry()
	if err != nil {
		return n, err
	}
	hosts := filepath.Join(t.o.Work, "hosts")
	if err := os.MkdirAll(filepath.Join(hosts, "atoll.local"), 0o755); err != nil {
		return n, err
	}
	toml := fmt.Sprintf("server = %q\ncapabilities = [\"pull\", \"resolve\"]\n", registry)
	if err := os.WriteFile(filepath.Join(hosts, "atoll.local", "hosts.toml"), []byte(toml), 0o644); err != nil {
		return n, err
	}
	config := map[string]any{
		"apiVersion": "atoll.dev/v1alpha1", "kind": "SphereletConfiguration", "nodeName": secondName, "nodeIP": secondIP,
		"dataDir": n.dataDir, "runDir": n.runDir, "networkNamespace": n.netns,
		"bootstrapKubeconfig": filepath.Join(t.data, "bootstrap.kubeconfig"), "clientCAFile": filepath.Join(t.data, "pki", "ca.crt"),
		"clusterCIDR": t.config.ClusterCIDR, "clusterDNS": t.config.ClusterDNS,
		"hypervisor": map[string]any{"guest": t.config.Hypervisor.Guest}, "images": map[string]any{"hostsDir": hosts},
		"storage": map[string]any{"datastores": []any{sharedDatastore(t.o.Work)}},
	}
	text, err := yaml.Marshal(config)
	if err == nil {
		err = os.WriteFile(n.config, text, 0o600)
	}
	if err == nil {
		err = os.WriteFile(secondLog(t.o.Work), nil, 0o644)
	}
	if err != nil {
		return n, err
	}
	n.agent = &agent{
		argv: []string{filepath.Join(t.bin, "spherelet"), "--config", n.config}, env: os.Environ(),
		log: secondLog(t.o.Work), record: filepath.Join(t.o.Work, "second.json"),
	}
	n.env = slices.DeleteFunc(n.env, func(s string) bool { return strings.HasPrefix(s, insideEnv+"=") })
	return n, n.wire()
}

// wire makes what a network between two hosts would be.
func (n *secondNode) wire() error {
	return ip([]string{
		"netns add " + n.netns,
		"link add " + n.link + " type veth peer name eth0 netns " + n.netns,
		"link set " + n.link + " up",
		"route add " + secondIP + "/32 dev " + n.link,
		"-n " + n.netns + " link set lo up",
		"-n " + n.netns + " link set eth0 up",
		"-n " + n.netns + " addr add " + secondIP + "/32 dev eth0",
		"-n " + n.netns + " route add " + firstIP + "/32 dev eth0 src " + secondIP,
		"-n " + n.netns + " route add default via " + firstIP + " dev eth0 src " + secondIP,
	}...)
}

func ip(commands ...string) error {
	for _, c := range commands {
		if out, err := exec.Command("ip", strings.Fields(c)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w %s", c, err, out)
		}
	}
	return nil
}

// serveRegistry has the second node pull from the first one's registry, which
// is on its loopback.
func (t *volumesTrial) serveRegistry() (string, error) {
	toml, err := os.ReadFile(filepath.Join(t.config.Images.HostsDir, "atoll.local", "hosts.toml"))
	if err != nil {
		return "", err
	}
	m := regexp.MustCompile(`server = "([^"]+)"`).FindSubmatch(toml)
	if m == nil {
		return "", fmt.Errorf("hosts.toml names no server: %s", toml)
	}
	target, err := url.Parse(string(m[1]))
	if err != nil {
		return "", err
	}
	ln, err := net.Listen("tcp4", net.JoinHostPort(firstIP, "0"))
	if err != nil {
		return "", err
	}
	go func() {
		_ = http.Serve(ln, &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) }}) //nolint:gosec // ends with this process
	}()
	return "http://" + ln.Addr().String(), nil
}

// join starts the second node and waits until it is Ready and reached.
func (t *volumesTrial) join(ctx context.Context) error {
	if err := t.second.start(); err != nil {
		return err
	}
	if err := t.awaitNode(ctx, secondName, true, 3*time.Minute); err != nil {
		return err
	}
	return until(ctx, "the second node's pod network", func(ctx context.Context) error {
		n, err := t.c.CoreV1().Nodes().Get(ctx, secondName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if n.Spec.PodCIDR == "" {
			return errors.New("the node has no podCIDR yet")
		}
		return ip("route replace " + n.Spec.PodCIDR + " via " + secondIP + " dev " + t.second.link + " onlink")
	})
}

// leave takes the second node away, as far as it is there, and says what it
// leaves behind.
func (t *volumesTrial) leave(ctx context.Context) error {
	n := t.second
	var errs []error
	if n.agent != nil && n.pid != 0 {
		if _, running := startTime(n.pid); running {
			errs = append(errs, syscall.Kill(n.pid, syscall.SIGTERM))
			select {
			case <-n.ended:
			case <-time.After(30 * time.Second):
				errs = append(errs, errors.New("the second node's spherelet does not end"), n.kill())
			}
		}
		if out, err := exec.CommandContext(ctx, n.argv[0], "cleanup", "--config", n.config).CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("spherelet cleanup of the second node: %w\n%s", err, out))
		}
	}
	if err := t.c.CoreV1().Nodes().Delete(ctx, secondName, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		errs = append(errs, err)
	}
	if links, err := exec.Command("ip", "-n", n.netns, "-o", "link").Output(); err == nil && strings.Contains(string(links), "atl") {
		errs = append(errs, fmt.Errorf("links of the second node: %s", links))
	}
	left, err := vms("atoll/" + filepath.Base(n.runDir))
	if errs = append(errs, err); len(left) > 0 {
		errs = append(errs, fmt.Errorf("VMs of the second node: %v", left))
	}
	_ = exec.Command("ip", "link", "del", n.link).Run() // may be gone with the namespace
	if err := exec.Command("ip", "netns", "del", n.netns).Run(); err != nil {
		errs = append(errs, fmt.Errorf("ip netns del %s: %w", n.netns, err))
	}
	if mounts, _ := os.ReadFile("/proc/mounts"); strings.Contains(string(mounts), t.o.Work) {
		errs = append(errs, errors.New("mounts of the second node are left"))
	}
	return errors.Join(errs...)
}
