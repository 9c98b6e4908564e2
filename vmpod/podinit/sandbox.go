package podinit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// SetupSandbox gives the VM its identity. Each step may be repeated, so a
// host that lost the answer, or saw it fail, asks again; once it has
// succeeded it does nothing any more.
func (a *agent) SetupSandbox(_ context.Context, r *agentapi.SetupSandboxRequest) (*agentapi.SetupSandboxResponse, error) {
	arrived := time.Now()
	a.setup.Lock()
	defer a.setup.Unlock()
	a.mu.Lock()
	done := a.ready
	a.mu.Unlock()
	if done {
		return a.identified(), nil
	}
	<-a.modules
	ctx, cancel := context.WithTimeout(context.Background(), 3*deviceTimeout)
	defer cancel()
	if err := a.setUp(ctx, r, arrived); err != nil {
		return nil, fmt.Errorf("set up the sandbox: %w", err)
	}
	interfaces := map[string]bool{}
	for _, i := range r.Interfaces {
		interfaces[i.Name] = true
	}
	a.mu.Lock()
	a.ready, a.interfaces = true, interfaces
	a.mu.Unlock()
	slog.SetDefault(slog.Default().With("pod_uid", r.PodUid))
	slog.Info("sandbox ready", "hostname", r.Hostname, "interfaces", len(r.Interfaces), "ephemeral_disk", r.EphemeralDisk)
	return a.identified(), nil
}

// identified is the answer of a VM that is one of a kind.
func (a *agent) identified() *agentapi.SetupSandboxResponse {
	a.mu.Lock()
	defer a.mu.Unlock()
	return &agentapi.SetupSandboxResponse{BootId: a.bootID, ClockNs: time.Now().UnixNano()}
}

// startPause starts the process that keeps the pod's namespaces, if it has
// any of its own beside the VM's.
func (a *agent) startPause(r *agentapi.SetupSandboxRequest) error {
	a.mu.Lock()
	started := a.sharedPID != "" || a.userns != nil // by a call whose answer was lost
	a.mu.Unlock()
	if started || !r.SharePid && r.UserNamespace == nil {
		return nil
	}
	if r.UserNamespace != nil {
		if err := admitUserNamespace(); err != nil {
			return err
		}
	}
	dir, err := a.reaper.startPause(r.UserNamespace)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if r.SharePid {
		a.sharedPID = dir + "pid"
	}
	if r.UserNamespace != nil {
		a.userns = &userNamespace{path: dir + "user", first: int(r.UserNamespace.First)}
	}
	return nil
}

// setSettings writes what containers resolve names by, and the pod's sysctls.
func (a *agent) setSettings(r *agentapi.SetupSandboxRequest) error {
	if err := os.WriteFile(filepath.Join(a.places.etc, "resolv.conf"), []byte(resolvConf(r.Dns)), 0o644); err != nil {
		return err
	}
	return setSysctls(r.Sysctls)
}

func resolvConf(d *agentapi.DNS) string {
	var b strings.Builder
	if len(d.GetSearches()) > 0 {
		b.WriteString("search " + strings.Join(d.GetSearches(), " ") + "\n")
	}
	for _, s := range d.GetServers() {
		b.WriteString("nameserver " + s + "\n")
	}
	if len(d.GetOptions()) > 0 {
		b.WriteString("options " + strings.Join(d.GetOptions(), " ") + "\n")
	}
	return b.String()
}

// setSysctls writes names with dots or slashes below /proc/sys.
func setSysctls(values map[string]string) error {
	root, err := os.OpenRoot("/proc/sys")
	if err != nil {
		return err
	}
	defer root.Close()
	for name, value := range values {
		f, err := root.OpenFile(sysctlPath(name), os.O_WRONLY, 0)
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("sysctl %s is not known to this kernel: %w", name, errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return fmt.Errorf("sysctl %s: %w", name, err)
		}
		_, err = f.WriteString(value)
		if err = errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("sysctl %s=%q: %v: %w", name, value, err, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// sysctlPath turns a sysctl's name into its file, as sysctl(8) does: the
// first separator says which one is meant, and the other one is then literal.
func sysctlPath(name string) string {
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '.' {
		return strings.Map(func(r rune) rune {
			switch r {
			case '.':
				return '/'
			case '/':
				return '.'
			}
			return r
		}, name)
	}
	return name
}
