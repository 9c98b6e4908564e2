package qemu

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/holes"
	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// A fileIdentity changes when a file is replaced or written to.
type fileIdentity struct {
	dev, inode  uint64
	size        int64
	mtime, ctim unix.Timespec
}

func identityOf(st *unix.Stat_t) fileIdentity {
	return fileIdentity{st.Dev, st.Ino, st.Size, st.Mtim, st.Ctim}
}

// A generation is what templates are made of that can change under a driver.
type generation struct {
	qemu, kernel, initrd fileIdentity
}

// generation looks at the files as they are now.
func (d *Driver) generation() (generation, error) {
	var g generation
	for path, id := range map[string]*fileIdentity{d.cfg.Binary: &g.qemu, d.cfg.Guest.Kernel: &g.kernel, d.cfg.Guest.Initrd: &g.initrd} {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return g, &os.PathError{Op: "stat", Path: path, Err: err}
		}
		*id = identityOf(&st)
	}
	return g, nil
}

// A shape is what tells the templates of one generation apart.
type shape struct {
	cpus   int
	memory int64  // bytes, whole MiB
	tenant string // a namespace, if templates are not shared
	// furnished: with a disk and a NIC.
	furnished bool
}

func (d *Driver) shapeOf(spec vmpod.Spec) shape {
	s := shape{cpus: spec.CPUs, memory: memoryMiB(spec) << 20}
	if d.cfg.Templates.PerTenant {
		s.tenant = spec.Owner.Namespace
	}
	s.furnished = d.furnishes() && len(spec.NICs) == 1 && len(spec.Disks) > 0 && standsFor(spec.Disks[0])
	return s
}

// furnishes says whether templates may have devices. Their taps must not be
// where the host's are.
func (d *Driver) furnishes() bool { return d.cfg.Templates.Furnished && d.nowhere.err == nil }

// standsFor says whether a disk can take the place of a template's: what the
// guest knows of that one, but for its size, must be true of it.
func standsFor(disk vmpod.Disk) bool {
	return !disk.ReadOnly && (disk.Format == "" || disk.Format == "raw") && fileDriver(disk.Path) == "file"
}

// spec is what a VM of that shape is launched with, less a clone's own devices.
func (s shape) spec(id vmpod.ID) vmpod.Spec {
	spec := vmpod.Spec{ID: id, CPUs: s.cpus, Memory: s.memory}
	if s.furnished {
		mac, _ := net.ParseMAC(agentapi.PlaceholderMAC)
		spec.Disks = []vmpod.Disk{{ID: "placeholder"}}
		spec.NICs = []vmpod.NIC{{ID: "placeholder", MAC: mac}}
	}
	return spec
}

// of is the spec of a clone as far as the template's devices go.
func (s shape) of(spec vmpod.Spec) vmpod.Spec {
	like := s.spec(spec.ID)
	if s.furnished {
		like.Disks, like.NICs = slices.Clone(spec.Disks[:1]), slices.Clone(spec.NICs[:1])
		like.NICs[0].MTU = 0 // the agent's affair: the device would have another feature
	}
	return like
}

// templateKey names a template on this host by all that it depends on: its own
// content, and that of each file; clones of an equal key run alike.
func (d *Driver) templateKey(s shape) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(d.cfg.Binary, &st); err != nil {
		return "", &os.PathError{Op: "stat", Path: d.cfg.Binary, Err: err}
	}
	boot, err := bootID()
	if err != nil {
		return "", err
	}
	c := d.command(s.spec(vmpod.ID{PodUID: "template"}))
	c.tscKHz = 0 // measured anew by each driver, and the same for one boot
	digests := &digester{}
	argv, err := c.argv(digests)
	if err = errors.Join(err, digests.err); err != nil {
		return "", err
	}
	h := sha256.New()
	fmt.Fprintf(h, "template 1\x00%s\x00%+v\x00%d.%d\x00%s\x00", boot, identityOf(&st), d.qemu.major, d.qemu.minor, s.tenant)
	_, _ = io.WriteString(h, strings.Join(argv, "\x00")) // a hash takes everything
	return hex.EncodeToString(h.Sum(nil)[:16]), nil
}

// A digester stands in for what a command line names by the content's digest.
type digester struct{ err error }

func (d *digester) file(path string) string {
	f, err := os.Open(path)
	if err != nil {
		d.err = errors.Join(d.err, err)
		return ""
	}
	defer f.Close()
	sum, err := contentDigest(f)
	d.err = errors.Join(d.err, err)
	return sum
}

func (d *digester) opened(*os.File) string               { return "" }
func (d *digester) disk(vmpod.Disk) (string, error)      { return "", nil }
func (d *digester) listener(name string) (string, error) { return name, nil }
func (d *digester) tap(vmpod.NIC) (string, error)        { return "", nil }
func (d *digester) extra() []string                      { return nil }

// contentDigest is the SHA-256 of a file.
func contentDigest(f *os.File) (string, error) {
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// digestOf is the SHA-256 of a memfd's pages that are not all zeros, and of
// where they are: reading a hole of a guest's RAM makes a page of it.
func digestOf(f *os.File) (string, error) {
	st, err := f.Stat()
	if err != nil {
		return "", err
	}
	h := sha256.New()
	buf, zeros := make([]byte, 1<<20), make([]byte, 4096)
	err = holes.Data(f, st.Size(), func(from, to int64) error {
		for at := from - from%int64(len(zeros)); at < to; {
			n, err := f.ReadAt(buf[:min(int64(len(buf)), to-at)], at)
			if n == 0 {
				return err
			}
			for i := 0; i < n; i += len(zeros) {
				page := buf[i:min(i+len(zeros), n)]
				if !bytes.Equal(page, zeros[:len(page)]) {
					h.Write(binary.LittleEndian.AppendUint64(nil, uint64(at)+uint64(i)))
					h.Write(page)
				}
			}
			at += int64(n)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	h.Write(binary.LittleEndian.AppendUint64(nil, uint64(st.Size())))
	return hex.EncodeToString(h.Sum(nil)), nil
}
