package vcsim

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/holes"
)

// diskFiles are the disks in the datastores' directories: DIR/fcd/ID.vmdk is
// the descriptor, ID-flat.vmdk the bytes, ID-SNAPSHOT-flat.vmdk those of a
// snapshot. They are sparse and readable by QEMU.
type diskFiles struct{ dir func(datastore string) string }

func (s *Server) files() diskFiles { return diskFiles{s.diskDir} }

// diskDir is where a datastore's files are. A server that keeps nothing has
// them in a directory of its own, which Close removes.
func (s *Server) diskDir(datastore string) string {
	if s.config.Dir != "" {
		return s.datastoreDir(datastore)
	}
	if s.scratch == "" {
		dir, err := os.MkdirTemp("", "atoll-vcsim-")
		if err != nil { // the first file says so, too
			dir = filepath.Join(os.TempDir(), "atoll-vcsim-unusable")
		}
		s.scratch = dir
	}
	return filepath.Join(s.scratch, datastore)
}

func (f diskFiles) file(d *diskRecord, suffix string) string {
	return filepath.Join(f.dir(d.Datastore), "fcd", d.ID+suffix)
}

func (f diskFiles) descriptor(d *diskRecord) string { return f.file(d, ".vmdk") }
func (f diskFiles) flat(d *diskRecord) string       { return f.file(d, "-flat.vmdk") }
func (f diskFiles) snapshotFile(d *diskRecord, id string) string {
	return f.file(d, "-"+id+"-flat.vmdk")
}

// create makes the files of a disk with the bytes of another file, or zeroes.
func (f diskFiles) create(d *diskRecord, from string) error {
	if err := os.MkdirAll(filepath.Dir(f.flat(d)), 0o700); err != nil {
		return err
	}
	if err := copySparse(f.flat(d), from, d.MiB*mib); err != nil {
		return err
	}
	return f.describe(d)
}

func (f diskFiles) snapshot(d *diskRecord, id string) error {
	err := copySparse(f.snapshotFile(d, id), f.flat(d), d.MiB*mib)
	if err != nil {
		f.removeSnapshot(d, id)
	}
	return err
}

func (f diskFiles) extend(d *diskRecord, mibs int64) error {
	if err := os.Truncate(f.flat(d), mibs*mib); err != nil {
		return err
	}
	longer := *d
	longer.MiB = mibs
	return f.describe(&longer)
}

// describe writes the descriptor (VMware's Virtual Disk Format 5.0).
func (f diskFiles) describe(d *diskRecord) error {
	hex := strings.ReplaceAll(d.UUID, "-", "")
	var id strings.Builder
	for i := 0; i+2 <= len(hex); i += 2 {
		if i > 0 {
			id.WriteByte([]byte{' ', '-'}[b2i(i == 16)])
		}
		id.WriteString(hex[i : i+2])
	}
	text := fmt.Sprintf(`# Disk DescriptorFile
version=1
CID=fffffffe
parentCID=ffffffff
createType="vmfs"

# Extent description
RW %d VMFS "%s"

# The Disk Data Base
#DDB

ddb.adapterType = "lsilogic"
ddb.fcd.uuid = "%s"
ddb.uuid = "%s"
ddb.thinProvisioned = "%d"
ddb.virtualHWVersion = "21"
`, d.MiB*mib/512, filepath.Base(f.flat(d)), d.ID, id.String(), b2i(!d.Thick))
	return os.WriteFile(f.descriptor(d), []byte(text), 0o600)
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// remove erases a disk's files; what is not there is removed.
func (f diskFiles) remove(d *diskRecord) {
	_ = os.Remove(f.descriptor(d))
	_ = os.Remove(f.flat(d))
}

func (f diskFiles) removeSnapshot(d *diskRecord, id string) { _ = os.Remove(f.snapshotFile(d, id)) }

// taken is what a disk takes of its datastore.
func (f diskFiles) taken(d *diskRecord) (bytes int64) {
	bytes = d.MiB * mib
	if !d.Thick {
		bytes = allocated(f.flat(d))
	}
	for _, s := range d.Snapshots {
		bytes += allocated(f.snapshotFile(d, s.ID))
	}
	return bytes
}

func allocated(path string) int64 {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Blocks * 512
}

// copySparse makes a file of a size with the data of another one, holes left
// out; from may be empty.
func copySparse(to, from string, size int64) (err error) {
	out, err := os.OpenFile(to, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if err := out.Truncate(size); err != nil || from == "" {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	return holes.Data(in, size, func(start, end int64) error {
		_, err := io.Copy(io.NewOffsetWriter(out, start), io.NewSectionReader(in, start, end-start))
		return err
	})
}

func fileFault(err error, datastore string) types.BaseMethodFault {
	switch {
	case errors.Is(err, unix.ENOSPC):
		return &types.NoDiskSpace{Datastore: datastore}
	case errors.Is(err, fs.ErrNotExist):
		return &types.FileNotFound{FileFault: types.FileFault{VimFault: vimReason(err.Error())}}
	}
	return &types.CannotAccessFile{FileFault: types.FileFault{VimFault: vimReason(err.Error())}}
}

// configured is a datastore as the configuration has it.
func (s *Server) configured(name string) (Datastore, bool) {
	for _, d := range s.config.Datastores {
		if d.Name == name {
			return d, true
		}
	}
	return Datastore{}, false
}

// freeOf is what a datastore has left: of a size that was configured less what
// its disks take, else of the file system below it.
func (s *Server) freeOf(name string) int64 {
	d, ok := s.configured(name)
	if !ok {
		return 0
	}
	if d.Capacity == 0 {
		var fs unix.Statfs_t
		if unix.Statfs(s.datastoreDir(name), &fs) != nil {
			return 0
		}
		return int64(fs.Bavail) * fs.Bsize
	}
	return max(d.Free-s.used[name].taken, 0)
}

// A usage is what disks take of their datastore, and what they were promised.
type usage struct{ taken, provisioned int64 }

// countDisk looks at a disk's files and shows what its datastore has left. What
// a guest writes later counts from the next change of the disk on.
func (s *Server) countDisk(d *diskRecord) {
	var now usage
	if s.disks[d.ID] == d {
		now = usage{s.files().taken(d), d.MiB * mib}
	}
	was, sum := s.usage[d.ID], s.used[d.Datastore]
	s.used[d.Datastore] = usage{sum.taken + now.taken - was.taken, sum.provisioned + now.provisioned - was.provisioned}
	if s.usage[d.ID] = now; now == (usage{}) {
		delete(s.usage, d.ID)
	}
	s.showDatastore(d.Datastore)
}

// showDatastore shows what a datastore has left.
func (s *Server) showDatastore(name string) {
	ds, ok := s.vim.Get(s.inventory.stores[name]).(*simulator.Datastore)
	if !ok {
		return
	}
	var summary types.DatastoreSummary
	s.locked(ds, func() { summary = ds.Summary })
	used := s.used[name]
	summary.FreeSpace, summary.Uncommitted = s.freeOf(name), max(used.provisioned-used.taken, 0)
	s.update(ds, set("summary", summary))
	s.locked(ds, func() { ds.Info.GetDatastoreInfo().FreeSpace = summary.FreeSpace })
}
