package config

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/openatoll/atoll/vmpod"
)

func TestHostDirectories(t *testing.T) {
	base := t.TempDir()
	dir, data, link, file := filepath.Join(base, "logs"), filepath.Join(base, "atoll"), filepath.Join(base, "link"), filepath.Join(base, "file")
	for _, d := range []string{dir, filepath.Join(data, "podlogs")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	text := func(paths ...string) []byte {
		y := strings.Replace(minimal, "/var/lib/atoll", data, 1) + "nodeName: a\nhostDirectories:\n"
		for _, p := range paths {
			y += fmt.Sprintf("- path: %q\n  readOnly: true\n", p)
		}
		return []byte(y)
	}
	c, err := Parse(text(dir))
	if err != nil {
		t.Fatal(err)
	}
	if got := HostDirectories(c); len(got) != 1 || got[0] != (vmpod.HostDirectory{Path: dir, ReadOnly: true}) {
		t.Errorf("HostDirectories = %+v", got)
	}
	for _, kubelet := range []string{dir, base, filepath.Join(dir, "kubelet")} {
		if err := KeepHostDirectoriesFrom(c, "--kubelet-root", kubelet); err == nil || !strings.Contains(err.Error(), "--kubelet-root") {
			t.Errorf("a kubelet's directory %s: %v", kubelet, err)
		}
	}
	for _, tt := range []struct{ name, path, want string }{
		{"the whole host", "/", "the whole host"},
		{"relative", "logs", "absolute"},
		{"not clean", dir + "/../logs", "absolute"},
		{"a slash at the end", dir + "/", "a slash at the end"},
		{"missing", dir + "/missing", "must be a directory of this host"},
		{"a link", link, "name that"},
		{"a file", file, "must be a directory"},
		{"the data directory", data, "dataDir"},
		{"above the data directory", base, "dataDir"},
		{"below the data directory", filepath.Join(data, "podlogs"), "dataDir"},
		{"above the run directory", "/run", "runDir"},
		{"the kernel's", "/proc/sys", "the host's kernel"},
	} {
		if _, err := Parse(text(tt.path)); err == nil || !strings.Contains(err.Error(), "hostDirectories[0].path") || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	if _, err := Parse(text(dir, dir)); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("twice: %v", err)
	}
}
