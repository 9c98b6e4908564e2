package overhead

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// ChildCommand is the hidden command that Measure runs, with the arguments of
// Child.
const ChildCommand = "measure-overhead"

// Measure runs the child and tells step of what it does. It takes a minute or
// two; cgroup is where the VMs are accounted, and is gone afterwards. It needs
// root.
func Measure(ctx context.Context, guestDir, cgroup string, step func(string)) (*Report, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	defer removeCgroup(cgroup)
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, self, ChildCommand, guestDir, cgroup)
	cmd.Stderr = &stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET,
		Setpgid:    true, // an interrupt from the terminal is ours to hand on
		Pdeathsig:  syscall.SIGKILL,
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("measure: %w", err)
	}
	var report *Report
	for sc := bufio.NewScanner(out); sc.Scan(); {
		var m message
		if err = json.Unmarshal(sc.Bytes(), &m); err != nil {
			continue // whatever a library prints
		}
		switch {
		case m.Step != "":
			step(m.Step)
		case m.Report != nil:
			report = m.Report
		}
		if m.Error != "" {
			err = errors.New(m.Error)
		}
	}
	if werr := cmd.Wait(); report == nil {
		switch {
		case ctx.Err() != nil:
			err = ctx.Err()
		case err == nil:
			err = fmt.Errorf("%w: %s", werr, strings.TrimSpace(stderr.String()))
		}
		return nil, fmt.Errorf("measure: %w", err)
	}
	return report, nil
}

// removeCgroup takes the group back that the driver keeps for VMs to come, and
// those above it that are empty; what is in use refuses to go.
func removeCgroup(cgroup string) {
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		below, _ := filepath.Glob(filepath.Join(root, cgroup, "*"))
		for _, dir := range below {
			_ = unix.Rmdir(dir)
		}
		for group := cgroup; group != "."; group = filepath.Dir(group) {
			dirs, _ := filepath.Glob(filepath.Join(root, group))
			for _, dir := range dirs {
				_ = unix.Rmdir(dir)
			}
		}
	}
}
