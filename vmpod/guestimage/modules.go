package guestimage

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
)

// wantedModules are what a pod VM needs from a kernel that has it as modules.
// All are loaded at boot, so each must earn its place: under emulation one
// costs 5 to 15 ms. What only some pods need is in demandModules, or left to the
// tuned kernel (nf_tables, tun).
var wantedModules = []string{
	"virtio_pci",     // every device
	"virtio_console", // the agent channel
	"virtio_blk",     // disks
	"virtio_net",     // the pod's interface
	"virtio_rng",     // entropy from the host
	"virtio_mem",     // growing
	"pvpanic-pci",    // tells the host of a kernel panic
	"erofs",          // image disks
	"overlay",        // container roots
	"ext4",           // the writable disk
	"quota_v2",       // ... and the limits of volumes on it
	"crc32c-intel",   // ext4's and erofs' checksums in hardware
	"af_packet",      // raw sockets in pods, DHCP clients
	"ipv6",
	"unix",
}

// demandModules are loaded when a pod first needs them: directory below
// /modules → modules. The directory is the name by which the kernel asks for
// them, but for the prefix "rtnl-link-".
var demandModules = map[string][]string{
	"virtiofs": {"virtiofs"}, // directories of the host
	"bridge":   {"bridge"},   // privileged pods that make networks
	"veth":     {"veth"},
	"xfs":      {"xfs"}, // volumes that have it
}

// optionalModules may be missing without an error: not every kernel release
// has them under this name, and a pod VM runs without.
var optionalModules = map[string]bool{
	"virtio_mem": true, "pvpanic-pci": true, "crc32c-intel": true,
	"virtio_rng": true, "ipv6": true, "unix": true, "af_packet": true,
	"virtiofs": true, "bridge": true, "veth": true, "xfs": true,
	"quota_v2": true,
}

// A moduleTree is /lib/modules/<release>.
type moduleTree struct {
	dir     string
	files   map[string]string   // module name → path relative to dir
	deps    map[string][]string // relative path → relative paths it needs
	builtin map[string]bool     // module names compiled into the kernel
}

func openModules(dir string) (*moduleTree, error) {
	t := &moduleTree{dir: dir, files: map[string]string{}, deps: map[string][]string{}, builtin: map[string]bool{}}
	err := eachLine(filepath.Join(dir, "modules.dep"), func(line string) {
		file, rest, ok := strings.Cut(line, ":")
		if !ok {
			return
		}
		t.files[moduleName(file)] = file
		t.deps[file] = strings.Fields(rest)
	})
	if err != nil {
		return nil, fmt.Errorf("kernel modules: %w (the kernel's package is damaged: reinstall it, or run `depmod`)", err)
	}
	err = eachLine(filepath.Join(dir, "modules.builtin"), func(line string) { t.builtin[moduleName(line)] = true })
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("kernel modules: %w", err)
	}
	return t, nil
}

// moduleName is the name by which the kernel knows a module's file: without
// directory and suffixes, and with underscores.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// loadOrder returns the files (relative to the tree) that must be loaded to
// have all of names, each after what it needs. Built-in modules are skipped.
func (t *moduleTree) loadOrder(names []string) ([]string, error) {
	var order []string
	done := map[string]bool{}
	var visit func(file string, depth int) error
	visit = func(file string, depth int) error {
		if done[file] {
			return nil
		}
		if depth > 64 {
			return fmt.Errorf("kernel modules: %s depends on itself in %s", file, filepath.Join(t.dir, "modules.dep"))
		}
		deps := t.deps[file]
		// depmod lists the nearest first; the farthest must be loaded first.
		for i := len(deps) - 1; i >= 0; i-- {
			if err := visit(deps[i], depth+1); err != nil {
				return err
			}
		}
		if !done[file] {
			done[file] = true
			order = append(order, file)
		}
		return nil
	}
	for _, name := range names {
		canonical := moduleName(name)
		if t.builtin[canonical] {
			continue
		}
		file, ok := t.files[canonical]
		if !ok {
			if optionalModules[name] {
				continue
			}
			return nil, fmt.Errorf("kernel modules: %s has no module %s, and it is not built in: choose another kernel (-kernel), or build the tuned one (`make guest-kernel`): %w", t.dir, name, errdefs.ErrNotFound)
		}
		if err := visit(file, 0); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// moduleEntries reads the modules that a pod VM needs, uncompressed.
func moduleEntries(ctx context.Context, dir string) ([]entry, error) {
	t, err := openModules(dir)
	if err != nil {
		return nil, err
	}
	order, err := t.loadOrder(wantedModules)
	if err != nil {
		return nil, err
	}
	if len(order) > 100 {
		return nil, fmt.Errorf("kernel modules: %d modules would be needed from %s, more than the two digits that order them", len(order), dir)
	}
	entries, err := readModules(ctx, dir, "/modules", order)
	if err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(demandModules)) {
		more, err := t.loadOrder(demandModules[name])
		if err != nil {
			return nil, err
		}
		more = slices.DeleteFunc(more, func(rel string) bool { return slices.Contains(order, rel) })
		if len(more) == 0 {
			continue
		}
		demanded, err := readModules(ctx, dir, "/modules/"+name, more)
		if err != nil {
			return nil, err
		}
		entries = append(append(entries, entry{path: "/modules/" + name, mode: modeDir | 0o755}), demanded...)
	}
	return entries, nil
}

// readModules makes the entries of modules, in their order.
func readModules(ctx context.Context, dir, into string, order []string) ([]entry, error) {
	var entries []entry
	for i, rel := range order {
		file := filepath.Join(dir, rel)
		data, err := readModule(ctx, file)
		if err != nil {
			return nil, fmt.Errorf("kernel module %s: %w", file, err)
		}
		if !bytes.HasPrefix(data, []byte("\x7fELF")) {
			return nil, fmt.Errorf("kernel module %s: not an ELF file once decompressed: %w", file, errdefs.ErrFailedPrecondition)
		}
		data = withoutSignature(data)
		name, _, _ := strings.Cut(path.Base(rel), ".ko")
		entries = append(entries, entry{
			path: fmt.Sprintf("%s/%02d-%s.ko", into, i, name),
			mode: modeFile | 0o644, data: data, from: file,
		})
	}
	return entries, nil
}

// readModule returns a module's ELF image. Debian 12 has plain files, newer
// ones .xz, others .zst or .gz.
func readModule(ctx context.Context, file string) ([]byte, error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	switch filepath.Ext(file) {
	case ".xz":
		cmd := exec.CommandContext(ctx, "xz", "-dc")
		cmd.Stdin = bytes.NewReader(raw)
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("xz -dc: %w (install xz-utils)", err)
		}
		return out, nil
	case ".zst":
		d, err := zstd.NewReader(nil)
		if err != nil {
			return nil, err
		}
		defer d.Close()
		return d.DecodeAll(raw, nil)
	case ".gz":
		d, err := gzip.NewReader(bytes.NewReader(raw))
		if err != nil {
			return nil, err
		}
		return io.ReadAll(d)
	}
	return raw, nil
}

// signatureMagic ends a signed module, after struct module_signature (12
// bytes, the last 4 of which are the signature's length, big-endian) and
// before that the signature itself (kernel/module_signature.c).
var signatureMagic = []byte("~Module signature appended~\n")

// withoutSignature drops a module's signature. Checking one takes 2.5 ms under
// emulation, 50 ms a boot, and protects nothing here: the host that vouches
// for the signature's key also wrote the initramfs and the kernel.
func withoutSignature(module []byte) []byte {
	body, signed := bytes.CutSuffix(module, signatureMagic)
	if !signed || len(body) < 12 {
		return module
	}
	length := int64(binary.BigEndian.Uint32(body[len(body)-4:]))
	if rest := int64(len(body)) - 12 - length; rest > 0 {
		return body[:rest]
	}
	return module
}

func eachLine(file string, do func(string)) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		if line := strings.TrimSpace(s.Text()); line != "" {
			do(line)
		}
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return nil
}
