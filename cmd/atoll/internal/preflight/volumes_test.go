package preflight

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestVolumes(t *testing.T) {
	for name, tt := range map[string]struct {
		programs    []string
		xfs         error
		level       Level
		words, cure string
	}{
		"all there":  {[]string{"qemu-img", "qemu-io"}, nil, OK, "qcow2", ""},
		"no xfs":     {[]string{"qemu-img", "qemu-io"}, errors.New("unknown option"), Warn, "file system xfs: unknown option", "apt-get install xfsprogs"},
		"no qemu-io": {[]string{"qemu-img"}, nil, Warn, "encrypted policies: qemu-io is not in PATH", "apt-get install qemu-utils"},
		"neither":    {nil, errors.New("not installed"), Warn, "xfs: not installed; datastores of format qcow2", "apt-get install xfsprogs qemu-utils"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for _, p := range tt.programs {
				if err := os.WriteFile(filepath.Join(dir, p), []byte("#!/bin/sh\n"), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			t.Setenv("PATH", dir)
			f := volumesWith(t.Context(), func(context.Context) error { return tt.xfs })
			if f.Level != tt.level || !strings.Contains(f.Detail, tt.words) || !strings.HasSuffix(f.Cure, tt.cure) || tt.cure == "" && f.Cure != "" {
				t.Errorf("%+v", f)
			}
		})
	}
}

// What check tries is what a volume is made with.
func TestFormatXFS(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	if err := formatXFS(t.Context()); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(filepath.Join(os.TempDir(), "atoll-check-*")); len(left) != 0 {
		t.Errorf("left %q", left)
	}
}
