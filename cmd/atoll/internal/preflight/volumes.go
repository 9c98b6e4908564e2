package preflight

import (
	"context"
	"os"
	"os/exec"
	"strings"

	"github.com/openatoll/atoll/storage/mkfs"
)

// volumes tries what some volumes need of a host beyond what pods do. The default
// class makes do without.
func volumes(ctx context.Context) Finding { return volumesWith(ctx, formatXFS) }

// formatXFS makes the smallest file system of what volumes are given: an old
// mkfs.xfs may be there and not know the features.
func formatXFS(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "atoll-check-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	maker, err := mkfs.New(dir)
	if err != nil {
		return err
	}
	return maker.Format(ctx, "xfs", mkfs.MinXFS, false, func(int64, int64, []byte) error { return nil })
}

func volumesWith(ctx context.Context, formatXFS func(context.Context) error) Finding {
	var cannot, pkgs []string
	if err := formatXFS(ctx); err != nil {
		cannot, pkgs = append(cannot, "file system xfs: "+err.Error()), append(pkgs, "xfsprogs")
	}
	for _, program := range []string{"qemu-img", "qemu-io"} {
		if _, err := exec.LookPath(program); err != nil {
			cannot, pkgs = append(cannot, "datastores of format qcow2 and encrypted policies: "+program+" is not in PATH"), append(pkgs, "qemu-utils")
			break
		}
	}
	if len(cannot) > 0 {
		return warn(aptCure+strings.Join(pkgs, " "), "some volumes cannot be had here: %s", strings.Join(cannot, "; "))
	}
	return ok("ext4, xfs, raw, qcow2, encrypted")
}
