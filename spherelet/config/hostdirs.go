package config

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/vmpod"
)

// kernelDirectories hold what is the host's kernel's: who can write there
// owns the host.
var kernelDirectories = []string{"/proc", "/sys", "/dev"}

// HostDirectories returns the directories that pods may mount.
func HostDirectories(c *v1alpha1.SphereletConfiguration) []vmpod.HostDirectory {
	var dirs []vmpod.HostDirectory
	for _, d := range c.HostDirectories {
		dirs = append(dirs, vmpod.HostDirectory{Path: d.Path, ReadOnly: d.ReadOnly})
	}
	return dirs
}

func validateHostDirectories(c *v1alpha1.SphereletConfiguration) (errs []error) {
	seen := map[string]bool{}
	for i, d := range c.HostDirectories {
		field := fmt.Sprintf("hostDirectories[%d].path", i)
		if err := checkHostDirectory(field, d.Path); err != nil {
			errs = append(errs, err)
			continue
		}
		if seen[d.Path] {
			errs = append(errs, invalid("%s is %q, which is there twice", field, d.Path))
		}
		seen[d.Path] = true
		errs = append(errs, keepApart(field, d.Path, "dataDir", c.DataDir), keepApart(field, d.Path, "runDir", c.RunDir))
		for _, k := range kernelDirectories {
			errs = append(errs, keepApart(field, d.Path, "the host's kernel", k))
		}
	}
	return errs
}

func checkHostDirectory(field, path string) error {
	switch {
	case !filepath.IsAbs(path) || filepath.Clean(path) != path:
		return invalid("%s is %q, must be an absolute path without \"..\", \".\" or a slash at the end", field, path)
	case path == "/":
		return invalid("%s is \"/\", which would give pods the whole host: name the directories that they need", field)
	}
	real, err := filepath.EvalSymlinks(path)
	switch {
	case err != nil:
		return invalid("%s is %q, must be a directory of this host: %v", field, path, err)
	case real != path:
		return invalid("%s is %q, which leads by a symbolic link to %s: name that", field, path, real)
	}
	if fi, err := os.Stat(path); err != nil || !fi.IsDir() {
		return invalid("%s is %q, must be a directory", field, path)
	}
	return nil
}

// keepApart returns an error if path is, holds or is in dir, which belongs to
// owner.
func keepApart(field, path, owner, dir string) error {
	if dir == "" {
		return nil
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	if within(path, dir) || within(dir, path) {
		return invalid("%s is %q, must have nothing to do with %s (%s)", field, path, dir, owner)
	}
	return nil
}

// KeepHostDirectoriesFrom returns an error if a host directory of the
// configuration is, holds or is in dir, which belongs to owner.
func KeepHostDirectoriesFrom(c *v1alpha1.SphereletConfiguration, owner, dir string) error {
	for i, d := range c.HostDirectories {
		if err := keepApart(fmt.Sprintf("hostDirectories[%d].path", i), d.Path, owner, dir); err != nil {
			return err
		}
	}
	return nil
}

// within says whether path is dir or lies below it; both are clean.
func within(dir, path string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}
