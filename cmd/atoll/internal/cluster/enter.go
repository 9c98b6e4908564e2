package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/cmd/atoll/internal/hostnet"
)

// DataDirEnv names the data directory for commands that are given none.
const DataDirEnv = "ATOLL_DATA_DIR"

// Enter replaces this process by argv, run in the cluster's network namespace
// with KUBECONFIG set, govc pointed at the embedded vCenter, and Atoll's
// binaries first in PATH. Nothing else of the
// caller's surroundings changes: mounts, directory and descriptors stay. It
// returns only if that fails.
func Enter(l Layout, a Assets, argv []string) error {
	s, err := ReadState(l)
	if err != nil {
		return err
	}
	if s.Isolated {
		there, err := hostnet.Exists(l.NetnsName())
		if err != nil {
			return err
		}
		if !there {
			return fmt.Errorf("the cluster in %s is down; `atoll up --data-dir %s` first: %w", l.DataDir(), l.DataDir(), errdefs.ErrFailedPrecondition)
		}
	}
	path := a.Bin + string(os.PathListSeparator) + os.Getenv("PATH")
	program, err := lookPath(argv[0], path)
	if err != nil {
		return err
	}
	set := VCenterEnv(l, s)
	set["PATH"], set["KUBECONFIG"], set[DataDirEnv] = path, l.Kubeconfig(), l.DataDir()
	env := setenv(os.Environ(), set)
	// exec keeps the namespace of the thread that calls it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := hostnet.Enter(s.Netns(l)); err != nil {
		return err
	}
	if err := unix.Exec(program, argv, env); err != nil {
		return fmt.Errorf("run %s: %w", program, err)
	}
	return nil
}

// VCenterEnv is the environment that points govc at the cluster's vCenter. The
// password is in it if its file can be read: the environment of a process is its
// user's alone, unlike its arguments.
func VCenterEnv(l Layout, s State) map[string]string {
	c := ControlPlaneConfig(l, s)
	set := map[string]string{
		"GOVC_URL":          "https://" + c.VCenterAddress().String() + "/sdk",
		"GOVC_USERNAME":     c.VCenterUser(),
		"GOVC_TLS_CA_CERTS": c.ClientCAFile(),
	}
	if password, err := os.ReadFile(c.VCenterPasswordFile()); err == nil {
		set["GOVC_PASSWORD"] = strings.TrimSpace(string(password))
	}
	return set
}

// lookPath is exec.LookPath with a PATH that is not this process's.
func lookPath(name, path string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for _, dir := range filepath.SplitList(path) {
		if file := filepath.Join(dir, name); filepath.IsAbs(file) && unix.Access(file, unix.X_OK) == nil {
			if st, err := os.Stat(file); err == nil && !st.IsDir() {
				return file, nil
			}
		}
	}
	return "", fmt.Errorf("%s: %w", name, exec.ErrNotFound)
}

// setenv returns env with the variables replaced.
func setenv(env []string, set map[string]string) []string {
	out := make([]string, 0, len(env)+len(set))
	for _, kv := range env {
		name, _, _ := strings.Cut(kv, "=")
		if _, ok := set[name]; !ok {
			out = append(out, kv)
		}
	}
	for name, value := range set {
		out = append(out, name+"="+value)
	}
	return out
}
