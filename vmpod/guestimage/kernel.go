package guestimage

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"debug/elf"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

//go:embed kernel/podvm.config
var fragment []byte

// FragmentHash names the committed configuration of the tuned kernel; a build
// of another configuration is not used.
func FragmentHash() string { return hexHash(fragment) }

// A kernel is one that was found on this machine.
type kernel struct {
	release string
	flavour string
	image   string // bzImage or vmlinux
	modules string // /lib/modules/<release>; empty if nothing is modular
	cmdline string
	config  string // what it was built from; may be missing
}

// quota says whether the kernel was built with project quotas for ext4, and has
// what it needs of them in the image. One whose configuration is not there is
// taken for one without.
func (k kernel) quota(image []entry) bool {
	b, err := os.ReadFile(k.config)
	if err != nil {
		return false
	}
	has := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		has[strings.TrimSpace(line)] = true
	}
	module := slices.ContainsFunc(image, func(e entry) bool { return strings.HasSuffix(e.path, "-quota_v2.ko") })
	return has["CONFIG_QUOTA=y"] && (has["CONFIG_QFMT_V2=y"] || has["CONFIG_QFMT_V2=m"] && module)
}

// kernelRecord is kernel.json, which kernel/build.sh writes beside a vmlinux.
type kernelRecord struct {
	Release  string `json:"release"`
	Fragment string `json:"fragment"` // FragmentHash of the configuration
	Source   string `json:"source"`   // version of the source package
}

// Debian's kernel leaves hot-plugged memory offline, counts at each switch of
// processes what every cgroup above waits for, which nobody reads, and asks
// security modules whose policies no guest has (AppArmor's profiles are refused
// at admission). The tuned one does none of it. Containers keep seccomp and
// landlock, and yama's sysctl.
const stockCmdline = kernelCmdline + " memhp_default_state=online psi=0 lsm=landlock,yama"

// The self-tests of the crypto API take 0.2 s under emulation and test what
// the distribution has tested; the CPU's random numbers are credited because
// nothing else is there so early, and podinit mixes in the host's before any
// container runs.
const kernelCmdline = "cryptomgr.notests random.trust_cpu=on"

// findKernel chooses by flavour: "stock", "tuned", or "auto" (or empty), which
// is the tuned one if a current one has been built.
func findKernel(flavour, tunedDir, bootDir, modulesDir string) (kernel, error) {
	switch flavour {
	case "", "auto":
		k, err := findTuned(tunedDir)
		if errdefs.IsNotFound(err) {
			return findStock(bootDir, modulesDir)
		}
		return k, err
	case FlavourTuned:
		return findTuned(tunedDir)
	case FlavourStock:
		return findStock(bootDir, modulesDir)
	}
	return kernel{}, fmt.Errorf("guest image: unknown kernel %q: want stock, tuned or auto: %w", flavour, errdefs.ErrInvalidArgument)
}

func findTuned(dir string) (kernel, error) {
	records, err := filepath.Glob(filepath.Join(dir, "*", "kernel.json"))
	if err != nil {
		return kernel{}, err
	}
	var best kernel
	for _, r := range records {
		b, err := os.ReadFile(r)
		if err != nil {
			return kernel{}, fmt.Errorf("tuned kernel: %w", err)
		}
		var rec kernelRecord
		if err := json.Unmarshal(b, &rec); err != nil {
			return kernel{}, fmt.Errorf("tuned kernel: %s is damaged (%v): remove %s and run `make guest-kernel`: %w", r, err, filepath.Dir(r), errdefs.ErrFailedPrecondition)
		}
		image := filepath.Join(filepath.Dir(r), "vmlinux")
		if _, err := os.Stat(image); err != nil || rec.Fragment != FragmentHash() {
			continue
		}
		if best.image == "" || versionLess(best.release, rec.Release) {
			best = kernel{release: rec.Release, flavour: FlavourTuned, image: image, cmdline: kernelCmdline, config: filepath.Join(filepath.Dir(r), "config")}
		}
	}
	if best.image == "" {
		return kernel{}, fmt.Errorf("tuned kernel: none in %s was built from the present configuration: run `make guest-kernel`: %w", dir, errdefs.ErrNotFound)
	}
	return best, nil
}

// findStock prefers Debian's cloud kernel, which is small and made for
// virtual machines, then any other whose modules are installed.
func findStock(bootDir, modulesDir string) (kernel, error) {
	for _, pattern := range []string{"vmlinuz-*-cloud-amd64", "vmlinuz-*"} {
		images, err := filepath.Glob(filepath.Join(bootDir, pattern))
		if err != nil {
			return kernel{}, err
		}
		release := func(image string) string { return strings.TrimPrefix(filepath.Base(image), "vmlinuz-") }
		sort.Slice(images, func(i, j int) bool { return versionLess(release(images[j]), release(images[i])) })
		for _, image := range images {
			modules := filepath.Join(modulesDir, release(image))
			if _, err := os.Stat(filepath.Join(modules, "modules.dep")); err == nil {
				return kernel{release: release(image), flavour: FlavourStock, image: image, modules: modules, cmdline: stockCmdline, config: filepath.Join(bootDir, "config-"+release(image))}, nil
			}
		}
	}
	return kernel{}, fmt.Errorf("guest image: no kernel: %s has no vmlinuz-* with modules in %s: run `apt-get install linux-image-cloud-amd64`: %w", bootDir, modulesDir, errdefs.ErrNotFound)
}

// versionLess compares digits by value and all else by bytes, so that
// 6.1.0-9 comes before 6.1.0-10.
func versionLess(a, b string) bool {
	for a != "" && b != "" {
		na, nb := digits(a), digits(b)
		if na > 0 && nb > 0 {
			x, _ := strconv.ParseUint(a[:na], 10, 64)
			y, _ := strconv.ParseUint(b[:nb], 10, 64)
			if x != y {
				return x < y
			}
			a, b = a[na:], b[nb:]
			continue
		}
		if a[0] != b[0] {
			return a[0] < b[0]
		}
		a, b = a[1:], b[1:]
	}
	return len(a) < len(b)
}

func digits(s string) int {
	n := 0
	for n < len(s) && n < 18 && s[n] >= '0' && s[n] <= '9' {
		n++
	}
	return n
}

// bootable returns the form of the kernel image that boots fastest: an ELF
// vmlinux with a PVH entry, taken out of the bzImage where it is compressed in
// a way we can undo. Otherwise the image comes back as it is.
func bootable(image []byte) []byte {
	if v, err := extractVMLinux(image); err == nil && hasPVHEntry(v) {
		return v
	}
	return image
}

var errNoPayload = errors.New("no payload that can be taken out")

// extractVMLinux undoes a bzImage (Documentation/x86/boot: payload_offset and
// payload_length count from the protected-mode code).
func extractVMLinux(image []byte) ([]byte, error) {
	if bytes.HasPrefix(image, []byte(elf.ELFMAG)) {
		return image, nil
	}
	if len(image) < 0x260 || string(image[0x202:0x206]) != "HdrS" || binary.LittleEndian.Uint16(image[0x206:]) < 0x208 {
		return nil, errNoPayload
	}
	setup := int(image[0x1f1])
	if setup == 0 {
		setup = 4
	}
	start := (setup+1)*512 + int(binary.LittleEndian.Uint32(image[0x248:]))
	length := int(binary.LittleEndian.Uint32(image[0x24c:]))
	if start < 0 || length < 8 || start+length > len(image) || start+length < start {
		return nil, errNoPayload
	}
	// The last 4 bytes are the uncompressed size.
	payload := image[start : start+length-4]
	size := int64(binary.LittleEndian.Uint32(image[start+length-4:]))
	if size > 512<<20 {
		return nil, errNoPayload
	}
	var r io.Reader
	switch {
	case bytes.HasPrefix(payload, []byte{0x02, 0x21, 0x4c, 0x18}):
		r = lz4.NewReader(bytes.NewReader(payload))
	case bytes.HasPrefix(payload, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		d, err := zstd.NewReader(bytes.NewReader(payload))
		if err != nil {
			return nil, err
		}
		defer d.Close()
		r = d
	case bytes.HasPrefix(payload, []byte{0x1f, 0x8b}):
		d, err := gzip.NewReader(bytes.NewReader(payload))
		if err != nil {
			return nil, err
		}
		r = d
	default:
		return nil, errNoPayload
	}
	out := make([]byte, size)
	if _, err := io.ReadFull(r, out); err != nil {
		return nil, fmt.Errorf("kernel payload: %w", err)
	}
	return out, nil
}

// hasPVHEntry looks for the note XEN_ELFNOTE_PHYS32_ENTRY (18), by which QEMU
// starts an ELF kernel.
func hasPVHEntry(vmlinux []byte) bool {
	f, err := elf.NewFile(bytes.NewReader(vmlinux))
	if err != nil || f.Machine != elf.EM_X86_64 {
		return false
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > 1<<20 {
			continue
		}
		b, err := io.ReadAll(p.Open())
		if err != nil {
			return false
		}
		for len(b) >= 12 {
			name := int(binary.LittleEndian.Uint32(b))
			desc := int(binary.LittleEndian.Uint32(b[4:]))
			typ := binary.LittleEndian.Uint32(b[8:])
			nameEnd := 12 + (name+3)&^3
			if name < 0 || desc < 0 || nameEnd > len(b) || name > len(b) || desc > len(b) {
				break
			}
			if typ == 18 && strings.TrimRight(string(b[12:12+name]), "\x00") == "Xen" {
				return true
			}
			next := nameEnd + (desc+3)&^3
			if next > len(b) {
				break
			}
			b = b[next:]
		}
	}
	return false
}

// hexHash is the SHA-256 of its arguments, one after the other.
func hexHash(b ...[]byte) string {
	h := sha256.New()
	for _, x := range b {
		h.Write(x)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// exists tells a missing file from one that cannot be read.
func exists(file string) (bool, error) {
	_, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}
