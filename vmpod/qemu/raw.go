package qemu

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/openatoll/atoll/vmpod"
)

// RawCommand returns the command line, the program first, that boots the same
// machine as Launch(spec) by hand: everything is named by path, QEMU runs as
// whoever calls it, listens on sockets in dir (qmp, agent, con) and starts at
// once. It is for people and for benchmarks that want a boot without Atoll.
func (d *Driver) RawCommand(spec vmpod.Spec, dir string) ([]string, error) {
	if err := checkSpec(spec); err != nil {
		return nil, err
	}
	c := d.command(spec)
	c.paused = false
	args, err := c.argv(paths{dir})
	if err != nil {
		return nil, err
	}
	return append([]string{d.cfg.Binary}, args...), nil
}

// paths names everything by path, for a command line that a person can run.
// A comma in a path is doubled where QEMU splits its arguments there.
type paths struct{ dir string }

func (p paths) file(path string) string           { return path }
func (p paths) disk(d vmpod.Disk) (string, error) { return d.Path, nil }
func (p paths) opened(f *os.File) string          { return f.Name() }
func (p paths) extra() []string                   { return nil }

func (p paths) listener(name string) (string, error) {
	return "path=" + strings.ReplaceAll(filepath.Join(p.dir, name), ",", ",,"), nil
}

func (p paths) tap(n vmpod.NIC) (string, error) {
	return "ifname=" + n.Tap + ",script=no,downscript=no", nil
}
