package guestimage

import (
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

// Options say what to build a guest from.
type Options struct {
	// Out is the guest directory; it is made if need be.
	Out string
	// Kernel is "stock", "tuned" or "auto" (the default when empty): the
	// tuned kernel if it has been built from the present configuration.
	Kernel string
	// Podinit is the static program that becomes /init.
	Podinit string
	// TunedDir holds tuned kernels, one directory each; "guest-kernel" beside
	// Out when empty.
	TunedDir string
	// CrunDir may hold a static crun; "guest-crun" beside Out when empty.
	CrunDir string
	// BootDir and ModulesDir default to /boot and /lib/modules.
	BootDir, ModulesDir string
	// Compression of the initramfs; the default is the one that boots fastest.
	Compression Compression
	// Logger gets one line about what was done; slog.Default() when nil.
	Logger *slog.Logger
}

// Build makes the guest, or finds that nothing has changed since the last
// time. The files in Out are replaced one by one and guest.json last, so a
// Load that runs beside it sees either the old guest or the new one; VMs that
// run are not affected.
func Build(ctx context.Context, o Options) (Guest, error) {
	o, err := o.complete()
	if err != nil {
		return Guest{}, err
	}
	k, err := findKernel(o.Kernel, o.TunedDir, o.BootDir, o.ModulesDir)
	if err != nil {
		return Guest{}, err
	}
	image, err := os.ReadFile(k.image)
	if err != nil {
		return Guest{}, fmt.Errorf("guest image: kernel: %w", err)
	}
	entries, err := collect(ctx, k, o)
	if err != nil {
		return Guest{}, err
	}
	archive, err := writeCPIO(entries)
	if err != nil {
		return Guest{}, err
	}
	inputs := hexHash([]byte(builderVersion+"\x00"+string(o.Compression)+"\x00"+k.release+"\x00"+k.flavour+"\x00"+k.cmdline+"\x00"), image, archive)
	if old, err := readManifest(o.Out); err == nil && old.Inputs == inputs {
		if g, err := Load(o.Out); err == nil {
			o.Logger.InfoContext(ctx, "guest image is up to date", "dir", o.Out, "kernel", g.KernelRelease, "flavour", g.Flavour)
			return g, nil
		}
	}

	boot := bootable(image)
	initrd, err := compress(archive, o.Compression)
	if err != nil {
		return Guest{}, err
	}
	m := manifest{
		Kernel: k.release, Flavour: k.flavour, CmdlineExtra: k.cmdline, Quota: k.quota(entries), Inputs: inputs,
		Files: map[string]string{KernelFile: k.image},
		Hash:  hexHash(boot, initrd, []byte(k.cmdline)),
	}
	for _, e := range entries {
		if e.from != "" {
			m.Files[e.path] = e.from
		}
		if e.path == "/init" {
			m.Podinit = hexHash(e.data)
		}
	}
	if err := write(o.Out, boot, initrd, m); err != nil {
		return Guest{}, err
	}
	g, err := Load(o.Out)
	if err == nil {
		o.Logger.InfoContext(ctx, "guest image built", "dir", o.Out, "kernel", g.KernelRelease, "flavour", g.Flavour,
			"kernel_bytes", len(boot), "initramfs_bytes", len(initrd), "unpacked_bytes", len(archive))
	}
	return g, err
}

// builderVersion changes when the same inputs must give another image.
const builderVersion = "2"

func (o Options) complete() (Options, error) {
	if o.Out == "" || o.Podinit == "" {
		return o, fmt.Errorf("guest image: Out and Podinit must be set: %w", errdefs.ErrInvalidArgument)
	}
	out, err := filepath.Abs(o.Out)
	if err != nil {
		return o, err
	}
	o.Out = out
	if o.TunedDir == "" {
		o.TunedDir = filepath.Join(filepath.Dir(o.Out), "guest-kernel")
	}
	if o.CrunDir == "" {
		o.CrunDir = filepath.Join(filepath.Dir(o.Out), "guest-crun")
	}
	if o.BootDir == "" {
		o.BootDir = "/boot"
	}
	if o.ModulesDir == "" {
		o.ModulesDir = "/lib/modules"
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if o.Compression == "" {
		o.Compression = defaultCompression
	}
	return o, nil
}

// collect returns everything that goes into the initramfs.
func collect(ctx context.Context, k kernel, o Options) ([]entry, error) {
	podinit := o.Podinit
	ok, err := exists(podinit)
	if err == nil && !ok {
		return nil, fmt.Errorf("guest image: %s is missing: build it with `CGO_ENABLED=0 go build -o %s ./cmd/podinit`, or run `make guest`: %w", podinit, podinit, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("guest image: %w", err)
	}
	if err := requireStatic(podinit); err != nil {
		return nil, err
	}
	init, err := fileEntry("/init", podinit, 0o755)
	if err != nil {
		return nil, err
	}
	entries := []entry{
		init,
		{path: "/dev/console", mode: modeChar | 0o600, major: 5, minor: 1},
		{path: "/dev/null", mode: modeChar | 0o666, major: 1, minor: 3},
		{path: "/tmp", mode: modeDir | 0o1777},
	}
	for _, d := range []string{"/proc", "/sys", "/run", "/etc", "/mnt", "/var"} {
		entries = append(entries, entry{path: d, mode: modeDir | 0o755})
	}
	crun, err := crunEntries(o.CrunDir, o.Logger)
	if err != nil {
		return nil, err
	}
	entries = append(entries, crun...)
	if k.modules == "" {
		return entries, nil
	}
	modules, err := moduleEntries(ctx, k.modules)
	return append(entries, modules...), err
}

// requireStatic refuses a program that would not start as PID 1.
func requireStatic(file string) error {
	f, err := elf.Open(file)
	if err != nil {
		return fmt.Errorf("guest image: %s is not a Linux program (%v): %w", file, err, errdefs.ErrInvalidArgument)
	}
	defer func() { _ = f.Close() }()
	interp, err := interpreter(f)
	if err != nil {
		return fmt.Errorf("guest image: %s: %w", file, err)
	}
	if interp != "" || f.Machine != elf.EM_X86_64 {
		return fmt.Errorf("guest image: %s must be a static x86-64 program: build it with CGO_ENABLED=0: %w", file, errdefs.ErrInvalidArgument)
	}
	return nil
}

// write replaces the files of the guest directory, the manifest last. It is
// removed first: a crash in between leaves "run make guest", not a mixture.
func write(dir string, kernel, initrd []byte, m manifest) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("guest image: %w", err)
	}
	if err := os.Remove(filepath.Join(dir, ManifestFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("guest image: %w", err)
	}
	text, err := json.MarshalIndent(m, "", "\t")
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
	}{{KernelFile, kernel}, {InitrdFile, initrd}, {ManifestFile, append(text, '\n')}} {
		if err := replaceFile(filepath.Join(dir, f.name), f.data); err != nil {
			return fmt.Errorf("guest image: %w", err)
		}
	}
	return nil
}

// replaceFile never truncates a file in place: QEMU may have it mapped.
func replaceFile(file string, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+"-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if _, err := f.Write(data); err != nil {
		return err
	}
	// QEMU runs as another user.
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}
