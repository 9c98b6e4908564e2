package controlplane

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/supervisor/controlplane/durable"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// The layout of a backup: a tar file whose first entry is the header, as JSON;
// the other entries are the header's files, in its order and no others.
const (
	backupFormat   = 2 // since 2 with the embedded vCenter's files
	backupHeader   = "atoll-backup.json"
	snapshotName   = "etcd.snapshot"
	maxHeaderBytes = 1 << 20
	maxSmallBytes  = 1 << 20 // each file under pki
	vcenterPrefix  = "vcenter/"
	maxVCenter     = 256 << 20 // bytes of each file of the embedded vCenter
)

// Backup writes the state of the running control plane into one new file of
// mode 0600: etcd's snapshot, all keys and certificates, the key of Secrets at
// rest, the embedded vCenter's users and inventory as they are just after the
// snapshot. Whoever can read it owns the cluster. A file that is there is not
// overwritten (ErrAlreadyExists); on an error no file is left. A control plane
// that does not run is ErrUnavailable.
func Backup(ctx context.Context, cfg Config, file string) (h BackupHeader, err error) {
	if err := cfg.Validate(); err != nil {
		return h, err
	}
	if _, err := os.Lstat(file); err == nil {
		return h, fmt.Errorf("backup: %s is there already: choose another name or remove it: %w", file, errdefs.ErrAlreadyExists)
	}
	snapshot, err := os.CreateTemp(filepath.Dir(file), ".atoll-snapshot.*") // 0600
	if err != nil {
		return h, fmt.Errorf("backup: %w", err)
	}
	defer os.Remove(snapshot.Name())
	defer snapshot.Close()
	revision, err := saveSnapshot(ctx, cfg, snapshot)
	if err != nil {
		return h, err
	}
	vcenter, err := readVCenter(cfg)
	if err != nil {
		return h, fmt.Errorf("backup: the embedded vCenter: %w", err)
	}
	h, err = describe(cfg, snapshot, revision, vcenter)
	if err != nil {
		return h, fmt.Errorf("backup: %w", err)
	}
	return h, writeBackup(cfg, file, h, snapshot, vcenter)
}

// saveSnapshot streams etcd's snapshot into f. The bytes end with their own
// SHA-256, which Restore checks once more.
func saveSnapshot(ctx context.Context, cfg Config, f *os.File) (revision int64, err error) {
	fail := func(err error) (int64, error) {
		return 0, fmt.Errorf("backup: snapshot of etcd on %s: %v: is the control plane running? %w", cfg.etcdSocket(), err, errdefs.ErrUnavailable)
	}
	cl, err := etcdClient(cfg)
	if err != nil {
		return fail(err)
	}
	defer cl.Close() //nolint:errcheck // nothing was written
	// A get first: a snapshot of an etcd that is not there would wait.
	probe, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	resp, err := cl.Get(probe, "/", clientv3.WithCountOnly())
	if err != nil {
		return fail(err)
	}
	snap, err := cl.SnapshotWithVersion(ctx)
	if err != nil {
		return fail(err)
	}
	defer snap.Snapshot.Close()
	if _, err := io.Copy(f, snap.Snapshot); err != nil {
		return fail(err)
	}
	return resp.Header.Revision, nil
}

// readVCenter reads the embedded vCenter's files, by name in a backup; those
// that are not there are left out. They are read once: the inventory grows while
// the backup is written.
func readVCenter(cfg Config) (map[string][]byte, error) {
	files := map[string][]byte{}
	for _, name := range vcsim.KeptFiles() {
		content, err := os.ReadFile(filepath.Join(cfg.VCenterDir(), name))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return nil, err
		case len(content) > maxVCenter:
			return nil, fmt.Errorf("%s has %d bytes, a backup takes %d: copy %s while the cluster is down: %w", name, len(content), maxVCenter, cfg.VCenterDir(), errdefs.ErrFailedPrecondition)
		}
		files[vcenterPrefix+name] = content
	}
	return files, nil
}

// describe makes the header: sums of the snapshot, of all files under pki and of
// the embedded vCenter's.
func describe(cfg Config, snapshot *os.File, revision int64, vcenter map[string][]byte) (BackupHeader, error) {
	cluster, err := readCluster(cfg)
	if err != nil {
		return BackupHeader{}, err
	}
	dataVersion, err := readDataVersion(cfg.DataDir)
	if err != nil {
		return BackupHeader{}, err
	}
	h := BackupHeader{
		Format: backupFormat, DataVersion: dataVersion, KubernetesVersion: cluster.KubernetesVersion,
		Created: time.Now().UTC().Truncate(time.Second), Revision: revision, Cluster: cluster,
	}
	sum := sha256.New()
	if _, err := snapshot.Seek(0, io.SeekStart); err != nil {
		return h, err
	}
	n, err := io.Copy(sum, snapshot)
	if err != nil {
		return h, err
	}
	h.Files = append(h.Files, BackupFile{Name: snapshotName, Size: n, SHA256: hex.EncodeToString(sum.Sum(nil))})
	root, err := os.OpenRoot(cfg.DataDir)
	if err != nil {
		return h, err
	}
	defer root.Close() //nolint:errcheck // nothing was written through it
	err = fs.WalkDir(root.FS(), "pki", func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasPrefix(d.Name(), ".") {
			return err
		}
		content, err := root.ReadFile(name)
		if err != nil {
			return err
		}
		h.Files = append(h.Files, describeFile(name, content))
		return nil
	})
	for _, name := range slices.Sorted(maps.Keys(vcenter)) {
		h.Files = append(h.Files, describeFile(name, vcenter[name]))
	}
	return h, err
}

func describeFile(name string, content []byte) BackupFile {
	sum := sha256.Sum256(content)
	return BackupFile{Name: name, Size: int64(len(content)), SHA256: hex.EncodeToString(sum[:])}
}

func writeBackup(cfg Config, file string, h BackupHeader, snapshot *os.File, vcenter map[string][]byte) (err error) {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(file)
			err = fmt.Errorf("backup: write %s: %w", file, err)
		}
	}()
	header, err := json.MarshalIndent(h, "", "  ")
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(cfg.DataDir)
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // nothing was written through it
	w := tar.NewWriter(f)
	add := func(name string, size int64, content io.Reader) error {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: size, ModTime: h.Created, Format: tar.FormatPAX}); err != nil {
			return err
		}
		_, err := io.Copy(w, content)
		return err
	}
	if err := add(backupHeader, int64(len(header)), strings.NewReader(string(header))); err != nil {
		return err
	}
	for _, bf := range h.Files {
		content, err := openEntry(root, snapshot, vcenter, bf.Name)
		if err != nil {
			return err
		}
		// A file that was renewed since it was described no longer has the
		// described sum.
		sum := sha256.New()
		err = add(bf.Name, bf.Size, io.TeeReader(content, sum))
		content.Close()
		if err == nil && hex.EncodeToString(sum.Sum(nil)) != bf.SHA256 {
			err = fmt.Errorf("%s changed meanwhile: try again: %w", bf.Name, errdefs.ErrUnavailable)
		}
		if err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(file))
}

func openEntry(root *os.Root, snapshot *os.File, vcenter map[string][]byte, name string) (io.ReadCloser, error) {
	if content, ok := vcenter[name]; ok {
		return io.NopCloser(bytes.NewReader(content)), nil
	}
	if name != snapshotName {
		return root.Open(name)
	}
	_, err := snapshot.Seek(0, io.SeekStart)
	return io.NopCloser(snapshot), err
}

// readHeader returns the header of a backup, or an ErrInvalidArgument for what
// is no backup, an ErrFailedPrecondition for one that a newer Atoll wrote.
func readHeader(r *tar.Reader, file string) (h BackupHeader, err error) {
	entry, err := r.Next()
	if err != nil || entry.Name != backupHeader || entry.Size > maxHeaderBytes {
		return h, fmt.Errorf("restore: %s is not a backup made by atoll: %w", file, errdefs.ErrInvalidArgument)
	}
	if err := json.NewDecoder(io.LimitReader(r, maxHeaderBytes)).Decode(&h); err != nil {
		return h, corrupt(file, "its header cannot be read: "+err.Error())
	}
	newer := func(what string) error {
		return fmt.Errorf("restore: %s was made by a newer Atoll (%s): restore it with that one: %w", file, what, errdefs.ErrFailedPrecondition)
	}
	switch {
	case h.Format > backupFormat:
		return h, newer(fmt.Sprintf("format %d, this build knows %d", h.Format, backupFormat))
	case h.DataVersion > DataVersion:
		return h, newer(fmt.Sprintf("data version %d, this build knows %d", h.DataVersion, DataVersion))
	case h.Format < 1 || h.DataVersion < 1:
		return h, corrupt(file, "its header has no version")
	}
	return h, checkNames(file, h)
}

// checkNames: nothing but files under pki and the embedded vCenter's is ever
// written from a backup.
func checkNames(file string, h BackupHeader) error {
	for i, bf := range h.Files {
		if i == 0 {
			if bf.Name != snapshotName {
				return corrupt(file, "the snapshot is not its first file")
			}
			continue
		}
		if bf.Size < 0 || bf.Size > maxSize(bf.Name) {
			return corrupt(file, fmt.Sprintf("it has an entry %q of %d bytes", truncate(bf.Name, 80), bf.Size))
		}
		if slices.ContainsFunc(h.Files[:i], func(o BackupFile) bool { return o.Name == bf.Name }) {
			return corrupt(file, fmt.Sprintf("it has %q twice", bf.Name))
		}
	}
	if len(h.Files) == 0 {
		return corrupt(file, "it has no snapshot")
	}
	return nil
}

// maxSize of a file that a backup may hold; negative if it may not.
func maxSize(name string) int64 {
	if of, ok := strings.CutPrefix(name, vcenterPrefix); ok && slices.Contains(vcsim.KeptFiles(), of) {
		return maxVCenter
	}
	if filepath.Clean(name) == name && filepath.IsLocal(name) && strings.HasPrefix(name, "pki/") {
		return maxSmallBytes
	}
	return -1
}

func corrupt(file, why string) error {
	return fmt.Errorf("restore: %s is damaged: %s: use another backup: %w", file, why, errdefs.ErrDataLoss)
}

// readFile copies the next entry, which must be bf, to w and checks its sum.
func readFile(r *tar.Reader, file string, bf BackupFile, w io.Writer) error {
	entry, err := r.Next()
	if err != nil {
		return corrupt(file, fmt.Sprintf("%s is missing (%v)", bf.Name, err))
	}
	if entry.Name != bf.Name || entry.Typeflag != tar.TypeReg || entry.Size != bf.Size {
		return corrupt(file, fmt.Sprintf("there is %q where %q belongs", truncate(entry.Name, 80), bf.Name))
	}
	sum := sha256.New()
	if _, err := io.Copy(io.MultiWriter(w, sum), r); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return corrupt(file, "it ends in the middle of "+bf.Name)
		}
		return fmt.Errorf("restore: %s: %w", bf.Name, err)
	}
	if hex.EncodeToString(sum.Sum(nil)) != bf.SHA256 {
		return corrupt(file, "the checksum of "+bf.Name+" is wrong")
	}
	return nil
}
