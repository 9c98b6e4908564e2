package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// binaryFacts is what a QEMU binary can do.
type binaryFacts struct {
	major, minor  int
	sandbox       bool
	sandboxReason string // why not
}

var versionRE = regexp.MustCompile(`QEMU emulator version (\d+)\.(\d+)`)

// examine asks the binary itself, which takes some 100 ms.
func examine(ctx context.Context, path string) (binaryFacts, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	var f binaryFacts
	out, err := exec.CommandContext(ctx, path, "-version").Output()
	v := versionRE.FindSubmatch(out)
	if err != nil || v == nil {
		return f, fmt.Errorf("%s -version: %v: %q: is this QEMU?: %w", path, err, out, errdefs.ErrFailedPrecondition)
	}
	f.major, _ = strconv.Atoi(string(v[1]))
	f.minor, _ = strconv.Atoi(string(v[2]))
	if f.major < 7 { // JSON for -device came with 6.2, i8042=off with 7.0
		return f, fmt.Errorf("%s is QEMU %d.%d: want 7.0 or newer: %w", path, f.major, f.minor, errdefs.ErrFailedPrecondition)
	}
	if err := trySandbox(ctx, path); err != nil {
		f.sandboxReason = err.Error()
	}
	f.sandbox = f.sandboxReason == ""
	return f, ctx.Err()
}

// trySandbox has QEMU begin in its sandbox, and end. What tells it to end is in
// the pipe before it starts: it ends, too, when this process is killed meanwhile.
func trySandbox(ctx context.Context, path string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = w.WriteString(`{"execute":"qmp_capabilities"}{"execute":"quit"}`)
	if err = errors.Join(err, w.Close()); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, path, "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none",
		"-sandbox", sandboxArgs, "-qmp", "stdio")
	cmd.Stdin = r
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return errors.New(strings.TrimSpace(stderr.String() + " " + err.Error()))
	}
	return nil
}

// residentCount returns the RSS of a process in bytes as the kernel has counted
// it, which may be off by some pages for each thread.
func residentCount(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/statm")
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0, fmt.Errorf("statm of process %d: %q", pid, b)
	}
	pages, err := strconv.ParseUint(f[1], 10, 64)
	return pages * uint64(os.Getpagesize()), err
}

// residentMemory returns RSS and PSS of a process in bytes.
func residentMemory(pid int) (rss, pss uint64, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/smaps_rollup")
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) != 3 || f[2] != "kB" {
			continue
		}
		n, err := strconv.ParseUint(f[1], 10, 64)
		if err != nil {
			continue
		}
		switch f[0] {
		case "Rss:":
			rss = n << 10
		case "Pss:":
			pss = n << 10
		}
	}
	return rss, pss, nil
}
