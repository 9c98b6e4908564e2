package images

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
)

// busyboxOff are the settings of busybox's defconfig that we do without: they
// need headers that the compiler's machine need not have, or change what the
// shell makes of variables.
var busyboxOff = []string{"CONFIG_STATIC", "CONFIG_TC", "CONFIG_SHA1_HWACCEL", "CONFIG_SHA256_HWACCEL"}

// busybox compiles busybox from upstream's archive in Debian's source package
// and returns its path. Debian's own program lacks pgrep, top and others that
// the suite runs, and then checks pass that have checked nothing.
func busybox(ctx context.Context, d *debian) (string, error) {
	archive, err := d.source(ctx, "busybox")
	if err != nil {
		return "", err
	}
	key := fmt.Sprintf("%x", sha256.Sum256([]byte(fmt.Sprint(filepath.Base(archive), busyboxOff))))[:16]
	dir := filepath.Join(d.dir, "busybox-"+key)
	program := filepath.Join(dir, "busybox")
	if _, err := os.Stat(program); err == nil {
		return program, nil
	}
	fmt.Println("critest images: compiling busybox (once)")
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	tree := filepath.Join(dir, "tree")
	if err := os.MkdirAll(tree, 0o755); err != nil {
		return "", err
	}
	if _, err := output(ctx, dir, "tar", "--extract", "--strip-components=1", "--directory", tree, "--file", archive); err != nil {
		return "", err
	}
	// The banner has the time of the build: keep the digest the same.
	if err := os.Setenv("SOURCE_DATE_EPOCH", "1600000000"); err != nil {
		return "", err
	}
	if _, err := output(ctx, tree, "make", "defconfig"); err != nil {
		return "", err
	}
	config := filepath.Join(tree, ".config")
	text, err := os.ReadFile(config)
	if err != nil {
		return "", err
	}
	for _, name := range busyboxOff {
		text = regexp.MustCompile(`(?m)^`+name+`=y$`).ReplaceAll(text, []byte("# "+name+" is not set"))
	}
	if err := os.WriteFile(config, text, 0o644); err != nil {
		return "", err
	}
	if _, err := output(ctx, tree, "sh", "-c", "yes '' | make oldconfig"); err != nil {
		return "", err
	}
	if _, err := output(ctx, tree, "make", "-j"+strconv.Itoa(runtime.NumCPU()), "busybox"); err != nil {
		return "", err
	}
	if err := os.Rename(filepath.Join(tree, "busybox"), program); err != nil {
		return "", err
	}
	return program, os.RemoveAll(tree)
}
