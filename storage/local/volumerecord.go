package local

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/storage"
)

// A record is all that is known of a volume or a snapshot. It is written
// before the act that it is about.
type record struct {
	Version int         `json:"version"`
	ID      string      `json:"id"`
	Name    string      `json:"name"`
	State   recordState `json:"state"`
	// By is the host whose act a record in another state than ready is.
	By string `json:"by,omitempty"`

	Bytes int64 `json:"bytes"`
	// Growing is the size that the files may have already, 0 if they have not.
	Growing int64 `json:"growing,omitempty"`

	Policy         string `json:"policy"`
	Thick          bool   `json:"thick,omitempty"`
	Encrypted      bool   `json:"encrypted,omitempty"`
	IOPS           int64  `json:"iops,omitempty"`
	BytesPerSecond int64  `json:"bytesPerSecond,omitempty"`
	// OwnKey: the claim brought the key, so whoever attaches must.
	OwnKey bool `json:"ownKey,omitempty"`

	// Disk is its own file; Backing are those below it, nearest first, which
	// others may have below theirs.
	Disk    diskFile   `json:"disk"`
	Backing []diskFile `json:"backing,omitempty"`
	// Makes are files that a record in the state making may have brought into
	// being, beside Disk.
	Makes []string `json:"makes,omitempty"`

	// VolumeID is set for a snapshot.
	VolumeID string            `json:"volumeID,omitempty"`
	Source   *storage.Source   `json:"source,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`

	CreatedAt time.Time `json:"createdAt"`
	// Sum is of all the rest.
	Sum string `json:"sum"`
}

// A diskFile is a file in disksDir.
type diskFile struct {
	Name   string `json:"name"`
	Format string `json:"format"`
}

func (f diskFile) path() string { return path.Join(disksDir, f.Name) }

type recordState string

const (
	making   recordState = "making"   // files may be missing; nobody may see it
	ready    recordState = "ready"    // whole
	deleting recordState = "deleting" // files may be missing; it will not be seen again
)

// IDs are <datastore>.v-<name> and <datastore>.s-<name>: a name gives the same
// one again, so that two who make it meet.
var idRE = regexp.MustCompile(`^([0-9a-f]{12})\.([vs])-([0-9a-f]{24})$`)

var fileRE = regexp.MustCompile(`^[vs]-[0-9a-f]{24}-[0-9a-f]{12}\.(raw|luks|qcow2)$`)

func volumeID(ds, name string) string   { return ds + ".v-" + nameSum(name) }
func snapshotID(ds, name string) string { return ds + ".s-" + nameSum(name) }

func nameSum(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:12])
}

// datastoreOf takes an ID apart; ok is false for what is none of ours.
func datastoreOf(id, kind string) (ds string, ok bool) {
	m := idRE.FindStringSubmatch(id)
	if m == nil || m[2] != kind {
		return "", false
	}
	return m[1], true
}

// recordPath is where the record of an ID is.
func recordPath(id string) string {
	if _, ok := datastoreOf(id, "s"); ok {
		return path.Join(snapshotsDir, id+".json")
	}
	return path.Join(volumesDir, id+".json")
}

// newFile names a file that was never there.
func newFile(id, format string) diskFile {
	b := make([]byte, 6)
	_, _ = rand.Read(b) // never fails
	_, of, _ := strings.Cut(id, ".")
	return diskFile{of + "-" + hex.EncodeToString(b) + "." + format, format}
}

func (r record) sum() (string, error) {
	r.Sum = ""
	b, err := json.Marshal(r)
	if err != nil {
		return "", err
	}
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:]), nil
}

// write puts the record on the disk.
func (r record) write(root *os.Root) error {
	r.Version = layoutVersion
	var err error
	if r.Sum, err = r.sum(); err != nil {
		return err
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return replace(root, recordPath(r.ID), b)
}

// readRecord returns nil if there is none; ErrDataLoss if it is damaged.
func readRecord(root *os.Root, id string) (*record, error) {
	b, err := root.ReadFile(recordPath(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("record of %s: %w: %w", id, err, errdefs.ErrUnavailable)
	}
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, damaged(id, "its record is not JSON: %v", err)
	}
	sum, err := r.sum()
	switch {
	case err != nil:
		return nil, err
	case r.Version != layoutVersion:
		return nil, damaged(id, "its record has version %d, this program reads %d", r.Version, layoutVersion)
	case sum != r.Sum:
		return nil, damaged(id, "its record does not have the checksum that it says")
	case r.ID != id:
		return nil, damaged(id, "its record is that of %s", r.ID)
	}
	for _, f := range r.files() {
		if !fileRE.MatchString(f.Name) {
			return nil, damaged(id, "its record names the file %q", f.Name)
		}
	}
	return &r, nil
}

// damaged is ErrDataLoss: nothing of it is touched.
func damaged(id, format string, a ...any) error {
	return fmt.Errorf("%s: %s: nothing of it was changed; restore %s and its file from a backup, or have both erased: %w",
		id, fmt.Sprintf(format, a...), recordPath(id), errdefs.ErrDataLoss)
}

// files are all files that the record may stand for.
func (r record) files() []diskFile {
	fs := append([]diskFile{r.Disk}, r.Backing...)
	for _, name := range r.Makes {
		fs = append(fs, diskFile{Name: name})
	}
	return fs
}

// chain are the files that its content consists of.
func (r record) chain() []diskFile { return append([]diskFile{r.Disk}, r.Backing...) }

// ids lists what has records of a kind ("v" or "s"), whatever their state.
func ids(root *os.Root, kind string) ([]string, error) {
	dir := volumesDir
	if kind == "s" {
		dir = snapshotsDir
	}
	entries, err := fs.ReadDir(root.FS(), dir)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	var found []string
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if _, ours := datastoreOf(id, kind); ok && ours {
			found = append(found, id)
		}
	}
	return found, nil
}

// referenced are the files that any record stands for, but those of except. A
// record that cannot be read is an error: its files are not known.
func referenced(root *os.Root, except string) (map[string]bool, error) {
	used := map[string]bool{}
	for _, kind := range []string{"v", "s"} {
		all, err := ids(root, kind)
		if err != nil {
			return nil, err
		}
		for _, id := range all {
			if id == except {
				continue
			}
			r, err := readRecord(root, id)
			if err != nil {
				return nil, err
			}
			if r == nil {
				continue
			}
			for _, f := range r.files() {
				used[f.Name] = true
			}
		}
	}
	return used, nil
}

func (d *datastore) volume(r record) storage.Volume {
	return storage.Volume{
		ID: r.ID, Name: r.Name, Bytes: r.Bytes, Policy: r.Policy, At: d.at(), Datastore: d.Name,
		Format: r.Disk.Format, Source: r.Source, Labels: maps.Clone(r.Labels), CreatedAt: r.CreatedAt,
	}
}

func (d *datastore) snapshot(r record) storage.Snapshot {
	return storage.Snapshot{
		ID: r.ID, Name: r.Name, VolumeID: r.VolumeID, Bytes: r.Bytes, Policy: r.Policy, At: d.at(),
		Labels: maps.Clone(r.Labels), CreatedAt: r.CreatedAt, Ready: r.State == ready,
	}
}
