package controlplane

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"k8s.io/apimachinery/pkg/util/version"

	"github.com/openatoll/atoll/internal/flock"
	"github.com/openatoll/atoll/supervisor/controlplane/durable"
)

// DataVersion is the format of data directories that this build writes.
const DataVersion = 1

// CheckDataDir refuses a data directory that a newer Atoll has written
// (ErrFailedPrecondition) or that is no Atoll data directory
// (ErrInvalidArgument). A missing or empty one is fine.
func CheckDataDir(dir string) error {
	_, err := readDataVersion(dir)
	return err
}

// readDataVersion returns 0 for a directory without data.
func readDataVersion(dir string) (int, error) {
	file := filepath.Join(dir, "version")
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("data directory: %w", err)
	}
	v, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || v < 1 {
		return 0, fmt.Errorf("%s holds %q instead of a number: is %s an Atoll data directory? %w", file, truncate(string(b), 40), dir, errdefs.ErrInvalidArgument)
	}
	if v > DataVersion {
		return v, fmt.Errorf("data directory %s has version %d, this build knows versions up to %d: use the Atoll that wrote it or a newer one, or choose another directory: %w", dir, v, DataVersion, errdefs.ErrFailedPrecondition)
	}
	return v, nil
}

func truncate(s string, n int) string {
	if len(s) > n {
		return s[:n] + "…"
	}
	return s
}

// lockDataDir makes the directory if needed and holds its lock until the
// returned function is called or the process ends. It waits for a control plane
// that is being killed, until that has let go of its ports too.
func lockDataDir(c Config) (unlock func(), err error) {
	if err := os.MkdirAll(c.DataDir, 0o711); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	f, err := flock.Take(c.lockFile())
	if held := (*flock.HeldError)(nil); errors.As(err, &held) {
		return nil, fmt.Errorf("data directory %s is in use by process %d: stop that control plane first: %w", c.DataDir, held.PID, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return nil, fmt.Errorf("lock of the data directory: %w", err)
	}
	return func() { f.Close() }, nil
}

// prepareDataDir stamps a fresh directory and checks one with data against
// the configuration. The lock must be held.
func prepareDataDir(c Config) error {
	v, err := readDataVersion(c.DataDir)
	if err != nil {
		return err
	}
	if v == 0 && hasData(c) {
		return fmt.Errorf("data directory %s has data but no file \"version\": it was damaged or made by something else; restore the file (\"%d\") or choose an empty directory: %w", c.DataDir, DataVersion, errdefs.ErrFailedPrecondition)
	}
	if err := os.MkdirAll(c.RunDir, 0o711); err != nil {
		return fmt.Errorf("run directory: %w", err)
	}
	for _, dir := range []string{c.socketDir(), filepath.Dir(c.LogFile()), c.pkiPath(), c.pkiPath("kubeconfig"), c.etcdDir()} {
		if err := makePrivateDir(dir); err != nil {
			return err
		}
	}
	want := Cluster{ServiceCIDR: c.ServiceCIDR, PodCIDR: c.PodCIDR, NodeMask: c.NodeMask, ClusterDomain: c.ClusterDomain, KubernetesVersion: KubernetesVersion}
	have, err := readCluster(c)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return err
	default:
		if err := checkCluster(c.DataDir, have, want); err != nil {
			return err
		}
	}
	// The version goes first: a directory with data and no version is refused.
	if err := durable.WriteFile(c.versionFile(), []byte(strconv.Itoa(DataVersion)+"\n"), 0o644); err != nil {
		return err
	}
	return writeCluster(c, want)
}

// checkCluster compares what the data was written with and what is asked for.
func checkCluster(where string, have, want Cluster) error {
	differs := func(field string, was, is any) error {
		return fmt.Errorf("%s was made with %s %v, now %v is asked for: a cluster cannot change it; use the old value or a new data directory: %w", where, field, was, is, errdefs.ErrFailedPrecondition)
	}
	switch {
	case have.ServiceCIDR != want.ServiceCIDR:
		return differs("ServiceCIDR", have.ServiceCIDR, want.ServiceCIDR)
	case have.PodCIDR != want.PodCIDR:
		return differs("PodCIDR", have.PodCIDR, want.PodCIDR)
	case have.NodeMask != want.NodeMask:
		return differs("NodeMask", have.NodeMask, want.NodeMask)
	case have.ClusterDomain != want.ClusterDomain:
		return differs("ClusterDomain", have.ClusterDomain, want.ClusterDomain)
	}
	hv, err := version.ParseSemantic(have.KubernetesVersion)
	if err != nil {
		return fmt.Errorf("%s names Kubernetes version %q: %v: %w", where, truncate(have.KubernetesVersion, 40), err, errdefs.ErrInvalidArgument)
	}
	wv, err := version.ParseSemantic(want.KubernetesVersion)
	if err != nil {
		return fmt.Errorf("this build has Kubernetes version %q: %v: %w", want.KubernetesVersion, err, errdefs.ErrInvalidArgument)
	}
	if hv.Major() != wv.Major() || hv.Minor() > wv.Minor() {
		return fmt.Errorf("%s was written by Kubernetes %s, this build has %s, which cannot read all of it: use the Atoll that wrote it or a newer one: %w", where, have.KubernetesVersion, want.KubernetesVersion, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func readCluster(c Config) (Cluster, error) {
	var cl Cluster
	b, err := os.ReadFile(c.clusterFile())
	if err != nil {
		return cl, err
	}
	if err := json.Unmarshal(b, &cl); err != nil {
		return cl, fmt.Errorf("%s: %v: restore it from a backup: %w", c.clusterFile(), err, errdefs.ErrInvalidArgument)
	}
	return cl, nil
}

func writeCluster(c Config, cl Cluster) error {
	b, err := json.MarshalIndent(cl, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(c.clusterFile(), append(b, '\n'), 0o644)
}

// hasData says whether the directory holds a cluster's state or keys; empty
// directories, which a start that was cut short leaves, are none.
func hasData(c Config) bool {
	for _, name := range []string{filepath.Join(c.etcdDir(), "member"), c.pkiPath("ca.key"), c.pkiPath("sa.key"), c.encryptionFile()} {
		if _, err := os.Lstat(name); err == nil {
			return true
		}
	}
	return false
}

// makePrivateDir makes dir with mode 0700; one that is there must be a
// directory and belong to us, and gets that mode.
func makePrivateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	if !st.IsDir() {
		return fmt.Errorf("%s is not a directory (%s): remove it: %w", dir, st.Mode().Type(), errdefs.ErrFailedPrecondition)
	}
	if st.Mode().Perm() != 0o700 {
		if err := os.Chmod(dir, 0o700); err != nil {
			return fmt.Errorf("make directory private: %w", err)
		}
	}
	return nil
}
