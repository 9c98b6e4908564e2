// Package cluster brings a cluster on this machine up and down: its network
// namespace and node link, the supervisor and the spherelet.
package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/cmd/atoll/internal/hostnet"
	"github.com/openatoll/atoll/supervisor/controlplane"
)

// DefaultDataDir is where a cluster lives unless told otherwise.
const DefaultDataDir = "/var/lib/atoll"

// A Layout knows the paths of one cluster. All follow from its data
// directory, so that nothing needs to be recorded to find them again.
type Layout struct {
	data string
}

// NewLayout returns the layout of the cluster in dataDir, made absolute.
func NewLayout(dataDir string) (Layout, error) {
	abs, err := filepath.Abs(dataDir)
	if err != nil {
		return Layout{}, fmt.Errorf("data directory %q: %w", dataDir, err)
	}
	abs = resolve(abs)
	if abs == "/" {
		return Layout{}, fmt.Errorf("data directory / cannot be used; choose one of its own, such as %s: %w", DefaultDataDir, errdefs.ErrInvalidArgument)
	}
	return Layout{data: abs}, nil
}

// resolve follows symbolic links in as much of path as there is, so that one
// directory is one cluster whatever it is called, before and after it is made.
func resolve(path string) string {
	if path == "/" {
		return path
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real
	}
	return filepath.Join(resolve(filepath.Dir(path)), filepath.Base(path))
}

// DataDir is absolute.
func (l Layout) DataDir() string { return l.data }

// ID is 8 hex digits that follow from the data directory. They mark the
// cluster's run directory, network namespace and cgroups.
func (l Layout) ID() string { return filepath.Base(l.RunDir()) }

// RunDir holds sockets and process records; it is gone after a reboot.
func (l Layout) RunDir() string { return controlplane.DefaultRunDir(l.data) }

// Kubeconfig is the cluster administrator's.
func (l Layout) Kubeconfig() string { return filepath.Join(l.data, "kubeconfig") }

// LogDir holds one log a component.
func (l Layout) LogDir() string { return filepath.Join(l.data, "log") }

// Log is the log of a component ("supervisor", "spherelet", "audit").
func (l Layout) Log(component string) string {
	return filepath.Join(l.LogDir(), component+".log")
}

// Record is where a component's process is recorded.
func (l Layout) Record(component string) string {
	return filepath.Join(l.RunDir(), component+".json")
}

// NetnsName is the name of the network namespace of an isolated cluster.
func (l Layout) NetnsName() string { return "atoll-" + l.ID() }

// NetnsPath is its file.
func (l Layout) NetnsPath() string { return hostnet.Path(l.NetnsName()) }

// NodeDir is the data directory of a node's spherelet.
func (l Layout) NodeDir(node string) string { return filepath.Join(l.data, "nodes", node) }

// NodeRunDir is the run directory of a node's spherelet. It is apart from
// RunDir, which only root may enter: VM monitors run under their own user.
func (l Layout) NodeRunDir(node string) string { return controlplane.DefaultRunDir(l.NodeDir(node)) }

// SphereletConfig is the file from which a node's spherelet is configured.
func (l Layout) SphereletConfig(node string) string {
	return filepath.Join(l.NodeDir(node), "spherelet.yaml")
}

// HostsDir has the hosts.toml files through which this node pulls.
func (l Layout) HostsDir() string { return filepath.Join(l.data, "registry", "hosts") }

// RegistryDir holds what the embedded registry serves.
func (l Layout) RegistryDir() string { return filepath.Join(l.data, "registry", "data") }

func (l Layout) stateFile() string { return filepath.Join(l.data, "atoll.json") }

// lockFile is beside the data, not in it: it must outlive a purge, during
// which it is held.
func (l Layout) lockFile() string { return filepath.Join("/run/lock", "atoll-"+l.ID()+".lock") }

// Nodes returns the names of the nodes that have data here.
func (l Layout) Nodes() []string {
	entries, err := os.ReadDir(filepath.Join(l.data, "nodes"))
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
			names = append(names, e.Name())
		}
	}
	return names
}
