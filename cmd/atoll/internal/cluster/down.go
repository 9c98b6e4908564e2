package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/cmd/atoll/internal/hostnet"
	"github.com/openatoll/atoll/cmd/atoll/internal/leftovers"
)

// DownOptions of `down`.
type DownOptions struct {
	// Purge erases the data directory as well.
	Purge    bool
	Assets   Assets
	Progress func(Step)
}

// Down stops the cluster and takes back all that it made on this host but
// its data. It goes on after errors and returns them all; it succeeds when
// there is nothing to do. The caller holds the cluster's Lock.
func Down(ctx context.Context, l Layout, opt DownOptions) error {
	if opt.Progress == nil {
		opt.Progress = func(Step) {}
	}
	s, err := ReadState(l)
	switch {
	case errdefs.IsNotFound(err):
		// Never up, or purged by hand while it ran: what follows from the
		// path alone is still taken back, and no data is touched.
		if opt.Purge && !empty(l.DataDir()) {
			return fmt.Errorf("%s is not a data directory of Atoll (it has no %s): nothing is erased: %w", l.DataDir(), filepath.Base(l.stateFile()), errdefs.ErrInvalidArgument)
		}
		s = State{Isolated: true}
	case err != nil:
		return err
	}
	d := &down{Layout: l, state: s, opt: opt}
	return d.run(ctx)
}

type down struct {
	Layout
	state State
	opt   DownOptions
	errs  []error
}

// do runs one step and shows it if it did something.
func (d *down) do(what string, f func() (detail string, err error)) {
	began := time.Now()
	detail, err := f()
	if err != nil {
		d.errs = append(d.errs, err)
		return
	}
	if detail != "" {
		d.opt.Progress(Step{What: what, Detail: detail, Took: time.Since(began)})
	}
}

func (d *down) run(ctx context.Context) error {
	running := strings.Join(Running(d.Layout), " ")
	d.do(Spherelet, func() (string, error) {
		detail := ""
		if strings.Contains(running, Spherelet) {
			detail = "stopped, its pod VMs too"
		}
		return detail, stopSpherelet(ctx, d.Layout, d.opt.Assets)
	})
	d.do(Supervisor, func() (string, error) {
		killed, err := stopComponent(ctx, d.Layout, Supervisor, stopGrace)
		switch {
		case killed:
			return fmt.Sprintf("killed after %v", stopGrace), err
		case strings.Contains(running, Supervisor):
			return "stopped", err
		}
		return "", err
	})
	if len(d.errs) > 0 {
		// Something still runs: what it stands on is left to it, so that a
		// second `down` can do its work.
		return errors.Join(d.errs...)
	}
	d.do("network", func() (string, error) { return d.network(ctx) })
	d.do("cgroups", func() (string, error) { return "", d.cgroups() })
	d.do("run directories", d.runDirs)
	if d.opt.Purge {
		d.do("data", d.purge)
	}
	return errors.Join(d.errs...)
}

// stopSpherelet ends the node agent and then all that it left running: VMs
// outlive it by design.
func stopSpherelet(ctx context.Context, l Layout, a Assets) error {
	if _, err := stopComponent(ctx, l, Spherelet, stopGrace); err != nil {
		return err
	}
	var errs []error
	for _, node := range l.Nodes() {
		file := l.SphereletConfig(node)
		if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
		cmd := exec.CommandContext(ctx, a.Spherelet(), "cleanup", "--config", file)
		cmd.Env = componentEnv()
		out, err := cmd.CombinedOutput()
		cancel()
		if err != nil {
			errs = append(errs, fmt.Errorf("clean up node %s: %w: %s", node, err, lastLine(out)))
		}
	}
	return errors.Join(errs...)
}

func lastLine(b []byte) string {
	b = bytes.TrimSpace(b)
	return string(b[bytes.LastIndexByte(b, '\n')+1:])
}

func (d *down) network(ctx context.Context) (string, error) {
	if d.state.Isolated {
		there, err := hostnet.Exists(d.NetnsName())
		if err != nil || !there {
			return "", errors.Join(err, hostnet.Remove(d.NetnsName()))
		}
		return "namespace " + d.NetnsName() + " removed", hostnet.Remove(d.NetnsName())
	}
	removed, err := d.removeLink(ctx)
	if !removed {
		return "", err
	}
	return "link " + NodeLink + " removed", err
}

// cgroups removes the cluster's groups, and the one above that all clusters
// share unless another is in it. What is not empty holds a process, and stays
// to be found.
func (d *down) cgroups() error {
	var errs []error
	for _, root := range leftovers.CgroupRoots() {
		for _, id := range Scope(d.Layout).IDs {
			errs = append(errs, removeCgroups(filepath.Join(root, id)))
		}
		_ = os.Remove(root)
	}
	return errors.Join(errs...)
}

// removeCgroups removes a tree of groups, which only goes from its leaves.
func removeCgroups(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			dirs = append(dirs, path)
		}
		return nil // what is gone is fine
	})
	errs := []error{err}
	for _, dir := range slices.Backward(dirs) {
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove cgroup: %w", err))
		}
	}
	return errors.Join(errs...)
}

func (d *down) runDirs() (string, error) {
	dirs := append(nodeRunDirs(d.Layout), d.RunDir())
	var errs []error
	for _, dir := range dirs {
		errs = append(errs, unmountBelow(dir), os.RemoveAll(dir))
	}
	_ = os.Remove(filepath.Dir(d.RunDir())) // unless another cluster is there
	return "", errors.Join(errs...)
}

// purge erases the data directory. Its state file goes last, so that an
// interrupted purge can be repeated.
func (d *down) purge() (string, error) {
	if err := unmountBelow(d.DataDir()); err != nil {
		return "", err
	}
	entries, err := os.ReadDir(d.DataDir())
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("erase the data: %w", err)
	}
	for _, e := range entries {
		if path := filepath.Join(d.DataDir(), e.Name()); path != d.stateFile() {
			if err := os.RemoveAll(path); err != nil {
				return "", fmt.Errorf("erase the data: %w", err)
			}
		}
	}
	if err := os.Remove(d.stateFile()); err != nil {
		return "", fmt.Errorf("erase the data: %w", err)
	}
	// The directory itself may be a disk's mount point, which stays.
	if err := os.Remove(d.DataDir()); err != nil && !errors.Is(err, unix.EBUSY) {
		return "", fmt.Errorf("erase the data: %w", err)
	}
	return d.DataDir() + " erased", nil
}

// unmountBelow unmounts everything below dir, deepest first: erasing a
// directory must not reach into a file system that is mounted there.
func unmountBelow(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	var errs []error
	for i := len(mounts) - 1; i >= 0; i-- {
		if mounts[i].Mountpoint == dir {
			continue
		}
		if err := unix.Unmount(mounts[i].Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", mounts[i].Mountpoint, err))
		}
	}
	return errors.Join(errs...)
}

func empty(dir string) bool {
	entries, err := os.ReadDir(dir)
	return errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0
}
