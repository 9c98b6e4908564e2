package cluster

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

// Assets are the files that Atoll is made of, beside the atoll binary.
type Assets struct {
	// Bin holds spherelet and kubectl.
	Bin string
	// Guest holds kernel and initramfs of the pod VMs.
	Guest string
	// Images holds the demo images; empty if there are none.
	Images string
}

// FindAssets looks where `make build` puts them and where packages do. An
// explicit guest directory is taken as it is.
func FindAssets(guest string) (Assets, error) {
	self, err := os.Executable()
	if err != nil {
		return Assets{}, fmt.Errorf("find the atoll binary: %w", err)
	}
	if real, err := filepath.EvalSymlinks(self); err == nil {
		self = real
	}
	return assetsBeside(filepath.Dir(self), guest)
}

func assetsBeside(bin, guest string) (Assets, error) {
	a := Assets{Bin: bin}
	prefixes := []string{filepath.Join(bin, "../build"), filepath.Join(bin, "../lib/atoll"), "/usr/lib/atoll"}
	a.Images = firstDir("images", prefixes)
	if guest == "" {
		a.Guest = firstDir("guest", prefixes)
		if a.Guest == "" { // named, so that a check can say what it looked for
			a.Guest = filepath.Join(prefixes[0], "guest")
		}
		return a, nil
	}
	abs, err := filepath.Abs(guest)
	if err != nil {
		return a, fmt.Errorf("guest directory %q: %w: %w", guest, err, errdefs.ErrInvalidArgument)
	}
	a.Guest = abs
	return a, nil
}

func firstDir(name string, prefixes []string) string {
	for _, p := range prefixes {
		dir := filepath.Join(p, name)
		if st, err := os.Stat(dir); err == nil && st.IsDir() {
			return dir
		}
	}
	return ""
}

// Spherelet is the path of its binary.
func (a Assets) Spherelet() string { return filepath.Join(a.Bin, "spherelet") }
