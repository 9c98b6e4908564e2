// Package guestimage makes and finds what every pod VM boots from: a kernel
// and an initramfs that holds podinit, the kernel modules it needs and the
// OCI runtime crun.
//
// Inside the initramfs:
//
//	/init                     podinit, PID 1
//	/modules/NN-<name>.ko     what the kernel lacks, to be loaded in this order
//	/modules/<what>/NN-….ko   likewise, but only when a pod needs it
//	/usr/bin/crun             the OCI runtime, with its shared libraries
//	/dev/console, /dev/null   device nodes, for the time before devtmpfs
//	/proc /sys /dev /run ...  empty directories to mount on
//
// A kernel that has everything built in (flavour "tuned") has no /modules.
package guestimage

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

// Names of the files in a guest directory.
const (
	KernelFile   = "vmlinuz"
	InitrdFile   = "initramfs"
	ManifestFile = "guest.json"
)

// Flavours of kernel.
const (
	FlavourStock = "stock" // the distribution's, with modules
	FlavourTuned = "tuned" // built by `make guest-kernel`, nothing modular
)

// A Guest is what a pod VM boots from.
type Guest struct {
	// Kernel and Initrd are absolute paths, for QEMU's -kernel and -initrd.
	// The kernel is an ELF vmlinux with a PVH entry where there is one, which
	// saves the guest its own decompression, else a bzImage.
	Kernel, Initrd string
	// KernelRelease is what uname -r will say.
	KernelRelease string
	// Flavour is FlavourStock or FlavourTuned.
	Flavour string
	// Cmdline is what this kernel needs on its command line beyond what the
	// driver says.
	Cmdline string
	// Quota says that the kernel can limit projects on ext4: the pods' disks
	// may have what that takes.
	Quota bool
	// Hash names the content of kernel, initramfs and command line; equal
	// hashes boot equally. It is the key of anything cached per guest.
	Hash string
}

// manifest is guest.json.
type manifest struct {
	Kernel       string `json:"kernel"` // release
	Flavour      string `json:"flavour"`
	Podinit      string `json:"podinit"` // sha256 of /init
	CmdlineExtra string `json:"cmdlineExtra"`
	Quota        bool   `json:"quota,omitempty"`
	Hash         string `json:"hash"`
	// Inputs is the hash of all that Build read; equal inputs build nothing.
	Inputs string `json:"inputs"`
	// Files are the sources by their name in the image, for people.
	Files map[string]string `json:"files"`
}

// Load returns the guest that Build left in dir. Its errors name what is
// missing and the command that makes it.
func Load(dir string) (Guest, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Guest{}, err
	}
	m, err := readManifest(dir)
	if err != nil {
		return Guest{}, err
	}
	g := m.guest(dir)
	for _, p := range []string{g.Kernel, g.Initrd} {
		if st, err := os.Stat(p); err != nil || !st.Mode().IsRegular() || st.Size() == 0 {
			return Guest{}, fmt.Errorf("guest image: %s is missing or empty: run `make guest`: %w", p, errdefs.ErrNotFound)
		}
	}
	return g, nil
}

func readManifest(dir string) (manifest, error) {
	p := filepath.Join(dir, ManifestFile)
	b, err := os.ReadFile(p)
	if errors.Is(err, fs.ErrNotExist) {
		return manifest{}, fmt.Errorf("guest image: %s is missing: run `make guest`: %w", p, errdefs.ErrNotFound)
	}
	if err != nil {
		return manifest{}, fmt.Errorf("guest image: %w", err)
	}
	var m manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return manifest{}, fmt.Errorf("guest image: %s is damaged (%v): run `make guest`: %w", p, err, errdefs.ErrFailedPrecondition)
	}
	if m.Kernel == "" || m.Hash == "" {
		return manifest{}, fmt.Errorf("guest image: %s has no kernel or hash: run `make guest`: %w", p, errdefs.ErrFailedPrecondition)
	}
	return m, nil
}

func (m manifest) guest(dir string) Guest {
	return Guest{
		Kernel:        filepath.Join(dir, KernelFile),
		Initrd:        filepath.Join(dir, InitrdFile),
		KernelRelease: m.Kernel,
		Flavour:       m.Flavour,
		Cmdline:       m.CmdlineExtra,
		Quota:         m.Quota,
		Hash:          m.Hash,
	}
}
