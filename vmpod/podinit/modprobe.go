package podinit

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// modprobeFile is where the kernel looks for who loads modules on demand
// (CONFIG_MODPROBE_PATH): a link to this program.
const modprobeFile = "/sbin/modprobe"

// offerModules makes the link, where there is something to load, and not
// before the boot is over: the kernel asks for much then that is not there,
// and each question would cost the start of a program.
func offerModules(booted <-chan struct{}) {
	<-booted
	if sets, _ := filepath.Glob("/modules/*/*.ko"); len(sets) == 0 {
		return
	}
	err := os.MkdirAll(filepath.Dir(modprobeFile), 0o755)
	if err == nil {
		err = os.Symlink("/init", modprobeFile)
	}
	if err != nil {
		slog.Warn("kernel modules cannot be loaded on demand", "error", err)
	}
}

// moduleSet is the name of a directory of modules that belong together.
var moduleSet = regexp.MustCompile(`^[a-z0-9_]{1,32}$`)

// modprobe loads the modules that somebody in the pod needs for what he asked
// the kernel for, such as a bridge. The kernel calls it with "-q", "--" and a
// name, which a container with the right capability chooses, as in
// rtnl-link-KIND; it returns the exit code.
func modprobe(root string, args []string, load func(files []string)) int {
	if len(args) < 2 {
		fmt.Fprintln(os.Stderr, "modprobe: want the name of a module")
		return 2
	}
	name := strings.TrimPrefix(args[len(args)-1], "rtnl-link-")
	if !moduleSet.MatchString(name) {
		return 1
	}
	channel, rest := modulesIn(filepath.Join(root, name))
	files := append(channel, rest...)
	if len(files) == 0 {
		return 1 // built in, loaded before, or not there
	}
	slog.SetDefault(kernelLogger())
	load(files)
	return 0
}
