package controlplane

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	etcdsnapshot "go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.uber.org/zap"

	"github.com/openatoll/atoll/supervisor/controlplane/durable"
)

// revisionBump makes every revision after a restore newer than any that was
// handed out between the backup and its end, so that watches and caches of
// nodes that ran on cannot mistake new objects for old ones. A thousand
// million, as etcd's and Kubernetes' guides advise (etcdutl snapshot restore
// --bump-revision): 3 years of 10 writes a second.
const revisionBump = 1_000_000_000

// Restore puts a backup into a data directory that has no cluster in it. It
// checks the whole file before it writes, and takes its own work back on an
// error. A backup that was made before backups held the embedded vCenter leaves
// its files as they are. Refused are: a running control plane and a directory
// with data (ErrFailedPrecondition), a file that is no backup (ErrInvalidArgument) or is
// damaged (ErrDataLoss), a backup of a newer version or of other ranges than
// cfg's (ErrFailedPrecondition).
func Restore(ctx context.Context, cfg Config, file string) (h BackupHeader, err error) {
	if err := cfg.Validate(); err != nil {
		return h, err
	}
	if err := CheckDataDir(cfg.DataDir); err != nil {
		return h, err
	}
	unlock, err := lockDataDir(cfg)
	if err != nil {
		return h, fmt.Errorf("restore: %w", err)
	}
	defer unlock()
	if hasData(cfg) {
		return h, fmt.Errorf("restore: %s holds a cluster already: remove it first (atoll down --purge) or choose another directory: %w", cfg.DataDir, errdefs.ErrFailedPrecondition)
	}
	f, err := os.Open(file)
	if err != nil {
		return h, fmt.Errorf("restore: %w", err)
	}
	defer f.Close()
	r := tar.NewReader(f)
	if h, err = readHeader(r, file); err != nil {
		return h, err
	}
	want := Cluster{ServiceCIDR: cfg.ServiceCIDR, PodCIDR: cfg.PodCIDR, NodeMask: cfg.NodeMask, ClusterDomain: cfg.ClusterDomain, KubernetesVersion: KubernetesVersion}
	if err := checkCluster("backup "+file, h.Cluster, want); err != nil {
		return h, err
	}
	vcenter := slices.ContainsFunc(h.Files, func(bf BackupFile) bool { return strings.HasPrefix(bf.Name, vcenterPrefix) })
	if _, err := os.Lstat(cfg.VCenterDir()); vcenter && !errors.Is(err, fs.ErrNotExist) {
		return h, fmt.Errorf("restore: %s is there already: remove it first (atoll down --purge) or choose another directory: %w", cfg.VCenterDir(), errdefs.ErrFailedPrecondition)
	}
	if err := restoreFiles(ctx, cfg, r, file, h); err != nil {
		if vcenter {
			err = errors.Join(err, os.RemoveAll(cfg.VCenterDir()))
		}
		return h, errors.Join(err, undoRestore(cfg))
	}
	return h, nil
}

func restoreFiles(ctx context.Context, cfg Config, r *tar.Reader, file string, h BackupHeader) error {
	snapshot, err := os.CreateTemp(cfg.DataDir, ".restore-snapshot.*") // 0600
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	defer os.Remove(snapshot.Name())
	defer snapshot.Close()
	if err := readFile(r, file, h.Files[0], snapshot); err != nil {
		return err
	}
	contents := make(map[string][]byte, len(h.Files))
	for _, bf := range h.Files[1:] {
		var b bytes.Buffer
		if err := readFile(r, file, bf, &b); err != nil {
			return err
		}
		contents[bf.Name] = b.Bytes()
	}
	if _, err := r.Next(); !errors.Is(err, io.EOF) {
		return corrupt(file, "something follows its last file")
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := restoreEtcd(cfg, snapshot.Name()); err != nil {
		return corrupt(file, "etcd cannot restore its snapshot: "+err.Error())
	}
	for name, content := range contents {
		if err := restoreFile(cfg, name, content); err != nil {
			return fmt.Errorf("restore: %w", err)
		}
	}
	if err := writeCluster(cfg, h.Cluster); err != nil {
		return err
	}
	// Last: the directory counts as a cluster's from here on.
	return durable.WriteFile(cfg.versionFile(), []byte(strconv.Itoa(h.DataVersion)+"\n"), 0o644)
}

func restoreEtcd(cfg Config, snapshot string) error {
	return etcdsnapshot.NewV3(zap.NewNop()).Restore(etcdsnapshot.RestoreConfig{
		SnapshotPath:        snapshot,
		Name:                etcdMember,
		OutputDataDir:       cfg.etcdDir(),
		PeerURLs:            []string{etcdPeerURL},
		InitialCluster:      etcdMember + "=" + etcdPeerURL,
		InitialClusterToken: etcdToken,
		RevisionBump:        revisionBump,
		MarkCompacted:       true,
	})
}

func restoreFile(cfg Config, name string, content []byte) error {
	path := filepath.Join(cfg.DataDir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	mode := os.FileMode(0o600)
	if ext := filepath.Ext(name); ext == ".crt" || ext == ".pub" {
		mode = 0o644
	}
	return durable.WriteFile(path, content, mode)
}

// undoRestore removes what restoreFiles may have made. hasData was false and
// the lock is held, so all of it is ours.
func undoRestore(cfg Config) error {
	return errors.Join(os.RemoveAll(cfg.etcdDir()), os.RemoveAll(cfg.pkiPath()), removeIfThere(cfg.clusterFile()), removeIfThere(cfg.versionFile()))
}

func removeIfThere(file string) error {
	if err := os.Remove(file); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}
