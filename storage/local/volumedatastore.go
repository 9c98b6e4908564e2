package local

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/storage"
)

// A Datastore is a directory that an admin gives to volumes, with all below it.
type Datastore struct {
	// Name is a DNS label, the host's own.
	Name string
	// Path is absolute.
	Path string
	// MountPoint: something must be mounted at Path. Without, the datastore is
	// unknown, however the directory below looks.
	MountPoint bool
	// Shared: other hosts have the same directory, under whatever path, on a
	// file system whose locks (fcntl) hold between them, such as NFS.
	Shared bool
	// Format of new volumes: FormatRaw (also if empty) or FormatQCOW2, of which
	// a snapshot takes no time and no space on any file system. Encrypted
	// volumes are raw in LUKS in both.
	Format   string
	Policies []DatastorePolicy
}

// A DatastorePolicy is a policy that a datastore fits.
type DatastorePolicy struct {
	// Policy's Shared, Datastores and Topology are filled in. Datastores that
	// offer a policy of the same name must promise the same.
	storage.Policy
	// KeyFile has the key of encrypted volumes for which claims bring none: a
	// file of 16 to 512 bytes that only its owner can read. Where hosts share
	// the datastore all need the same.
	KeyFile string
}

// Names in a datastore. Nothing else in it is touched.
const (
	markerFile   = "atoll-datastore.json"
	lockFile     = "atoll-lock"
	volumesDir   = "volumes"
	snapshotsDir = "snapshots"
	leasesDir    = "leases"
	hostsDir     = "hosts"
	disksDir     = "disks"
)

// reserved is what volumes leave free on a datastore, in bytes, for records.
const reserved = 16 << 20

// A marker says which datastore a directory is. It is written once, on the
// first start with an empty directory.
type marker struct {
	Version int    `json:"version"`
	ID      string `json:"id"`
	// Name is what the host that made it calls it.
	Name      string    `json:"name"`
	Shared    bool      `json:"shared"`
	CreatedAt time.Time `json:"createdAt"`
}

const layoutVersion = 1

// A datastore is one that was met at least once, so that its ID is known. Its
// directory may be away at any time.
type datastore struct {
	Datastore
	id       string
	host     string
	noClones atomic.Bool // its file system has no FICLONE
	// recovered: what acts that died left was finished or undone.
	recovered atomic.Bool
}

func validID(id string) bool {
	b, err := hex.DecodeString(id)
	return err == nil && len(b) == 6
}

// unknown is the error of a datastore that is not as it was.
func (d Datastore) unknown(format string, a ...any) error {
	return fmt.Errorf("datastore %s (%s): %s: %w", d.Name, d.Path, fmt.Sprintf(format, a...), errdefs.ErrUnavailable)
}

// open opens the datastore's directory, if it is the one whose ID is known. The
// caller closes it; what is done through it stays in it, whatever becomes of
// the path.
func (d *datastore) open() (*os.Root, error) {
	root, m, err := openMarked(d.Datastore)
	if err != nil {
		return nil, err
	}
	if m == nil {
		root.Close()
		return nil, d.unknown("%s is not there, though it was: mount the datastore again", markerFile)
	}
	if m.ID != d.id {
		root.Close()
		return nil, d.unknown("it is the datastore %s, and was %s: mount the right one, or give this one a name of its own in the node's configuration", m.ID, d.id)
	}
	return root, nil
}

// openMarked opens a datastore's directory and reads its marker, nil if there
// is none.
func openMarked(d Datastore) (*os.Root, *marker, error) {
	if d.MountPoint {
		is, err := isMountPoint(d.Path)
		if err != nil {
			return nil, nil, d.unknown("%v", err)
		}
		if !is {
			return nil, nil, d.unknown("nothing is mounted there: mount the datastore")
		}
	}
	root, err := os.OpenRoot(d.Path)
	if err != nil {
		return nil, nil, d.unknown("%v", err)
	}
	b, err := root.ReadFile(markerFile)
	if errors.Is(err, fs.ErrNotExist) {
		return root, nil, nil
	}
	var m marker
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	switch {
	case err != nil:
		err = d.unknown("%s cannot be read: %v", markerFile, err)
	case !validID(m.ID):
		err = d.unknown("%s has no valid id: restore the file", markerFile)
	case m.Version != layoutVersion:
		err = d.unknown("it has version %d and this program reads %d", m.Version, layoutVersion)
	case m.Shared != d.Shared:
		err = d.unknown("it is marked shared=%t, the node's configuration says shared=%t", m.Shared, d.Shared)
	default:
		return root, &m, nil
	}
	root.Close()
	return nil, nil, err
}

// isMountPoint says whether something is mounted at path.
func isMountPoint(path string) (bool, error) {
	var here, above unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_NO_AUTOMOUNT, unix.STATX_MNT_ID, &here); err != nil {
		return false, fmt.Errorf("statx: %w", err)
	}
	if here.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return here.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
	}
	if err := unix.Statx(unix.AT_FDCWD, filepath.Dir(path), 0, unix.STATX_MNT_ID, &above); err != nil {
		return false, fmt.Errorf("statx: %w", err)
	}
	return here.Mnt_id != above.Mnt_id, nil
}

// adopt makes an empty directory a datastore, or reads which it is.
func adopt(d Datastore) (string, error) {
	root, m, err := openMarked(d)
	if err != nil {
		return "", err
	}
	defer root.Close()
	if m != nil {
		return m.ID, nil
	}
	if err := mustBeEmpty(root, d); err != nil {
		return "", err
	}
	id := make([]byte, 6)
	if _, err := rand.Read(id); err != nil {
		return "", err
	}
	m = &marker{Version: layoutVersion, ID: hex.EncodeToString(id), Name: d.Name, Shared: d.Shared, CreatedAt: time.Now().UTC()}
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return "", err
	}
	temp := "." + markerFile + "." + m.ID
	if err := writeSynced(root, temp, b); err != nil {
		return "", err
	}
	defer func() { _ = root.Remove(temp) }() // Renew removes one that is left
	// Of two hosts that meet an empty directory, one is first.
	if err := root.Link(temp, markerFile); err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if err := syncDir(root, "."); err != nil {
		return "", err
	}
	return adopted(d)
}

func adopted(d Datastore) (string, error) {
	root, m, err := openMarked(d)
	if err != nil {
		return "", err
	}
	defer root.Close()
	if m == nil {
		return "", d.unknown("%s vanished", markerFile)
	}
	return m.ID, nil
}

// mustBeEmpty refuses a directory with anything in it: it is somebody's.
func mustBeEmpty(root *os.Root, d Datastore) error {
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return d.unknown("%v", err)
	}
	for _, e := range entries {
		if e.Name() != "lost+found" && !strings.HasPrefix(e.Name(), "."+markerFile) {
			return fmt.Errorf("datastore %s (%s): it has no %s and is not empty (%s): give volumes a directory of their own: %w", d.Name, d.Path, markerFile, e.Name(), errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// makeDirs makes what a datastore consists of.
func makeDirs(root *os.Root) error {
	for _, dir := range []string{volumesDir, snapshotsDir, leasesDir, hostsDir, disksDir} {
		if err := root.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	f, err := root.OpenFile(lockFile, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), syncDir(root, "."))
}

// space is what statfs says of a datastore, less what is reserved.
func space(root *os.Root) (storage.Capacity, error) {
	f, err := root.Open(".")
	if err != nil {
		return storage.Capacity{}, err
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return storage.Capacity{}, os.NewSyscallError("fstatfs", err)
	}
	total := int64(st.Blocks) * st.Bsize
	free := max(int64(st.Bavail)*st.Bsize-reserved, 0)
	return storage.Capacity{Total: total, Available: free, MaxVolume: free / mib * mib}, nil
}

func (d *datastore) at() storage.Topology {
	t := storage.Topology{Datastore: d.id}
	if !d.Shared {
		t.Host = d.host
	}
	return t
}

func (d *datastore) policy(name string) (DatastorePolicy, bool) {
	for _, p := range d.Policies {
		if p.Name == name {
			return p, true
		}
	}
	return DatastorePolicy{}, false
}

// path is a name in the datastore as the host knows it.
func (d *datastore) path(name string) string { return filepath.Join(d.Path, name) }

// writeSynced writes a file that is on the disk when it returns.
func writeSynced(root *os.Root, name string, b []byte) error {
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

// replace puts b in the place of a file, whole or not at all. The caller has
// the lock of what the file is about, so nobody else writes its successor.
func replace(root *os.Root, name string, b []byte) error {
	if err := writeSynced(root, name+newSuffix, b); err != nil {
		return err
	}
	if err := root.Rename(name+newSuffix, name); err != nil {
		return err
	}
	return syncDir(root, filepath.Dir(name))
}

// newSuffix is of a record that is being written. It counts for nothing.
const newSuffix = ".new"

func syncDir(root *os.Root, dir string) error {
	f, err := root.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// erase removes a file for good; one that is gone succeeds.
func erase(root *os.Root, name string) error {
	if err := root.Remove(name); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	return syncDir(root, filepath.Dir(name))
}
