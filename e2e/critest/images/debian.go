package images

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// A debian downloads packages without installing any: as if on a machine that
// has none, so that what a package depends on comes with it.
type debian struct {
	dir string // keeps what was downloaded
}

func newDebian(dir string) (*debian, error) {
	for _, d := range []string{"debs/partial", "lists/partial", "sources"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	return &debian{dir: dir}, os.WriteFile(filepath.Join(dir, "status"), nil, 0o644)
}

var inst = regexp.MustCompile(`(?m)^Inst (\S+) \((\S+) .*\[(\S+)\]\)`)

// packages downloads the packages with all they depend on and returns the
// names of their files, sorted.
func (d *debian) packages(ctx context.Context, names ...string) ([]string, error) {
	options := []string{
		"-o", "Dir::State::status=" + filepath.Join(d.dir, "status"),
		"-o", "Dir::Cache::archives=" + filepath.Join(d.dir, "debs"),
		"-o", "APT::Install-Recommends=0", "-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=1", "-y",
	}
	if _, err := output(ctx, d.dir, "apt-get", slices.Concat(options, []string{"--download-only", "install"}, names)...); err != nil {
		return nil, err
	}
	plan, err := output(ctx, d.dir, "apt-get", slices.Concat(options, []string{"--simulate", "install"}, names)...)
	if err != nil {
		return nil, err
	}
	var files []string
	for _, m := range inst.FindAllSubmatch(plan, -1) {
		version := strings.ReplaceAll(string(m[2]), ":", "%3a")
		files = append(files, fmt.Sprintf("%s_%s_%s.deb", m[1], version, m[3]))
	}
	slices.Sort(files)
	return files, nil
}

// unpack unpacks packages below root and drops what no test reads.
func (d *debian) unpack(ctx context.Context, root string, files []string) error {
	for _, f := range files {
		if _, err := output(ctx, d.dir, "dpkg-deb", "--extract", filepath.Join(d.dir, "debs", f), root); err != nil {
			return err
		}
	}
	for _, dir := range []string{"doc", "man", "info", "locale", "lintian", "bug", "doc-base", "common-licenses"} {
		if err := os.RemoveAll(filepath.Join(root, "usr/share", dir)); err != nil {
			return err
		}
	}
	return nil
}

// source downloads a source package and returns the path of its upstream
// archive: Debian's patches are left out. The sources' index is fetched for
// it, beside the machine's own, which are not changed.
func (d *debian) source(ctx context.Context, name string) (string, error) {
	pattern := filepath.Join(d.dir, "sources", name+"_*.orig.tar.*[^c]")
	if found, err := filepath.Glob(pattern); err != nil || len(found) > 0 {
		return first(found), err
	}
	parts := filepath.Join(d.dir, "sources.list.d")
	if err := sourceLists(parts); err != nil {
		return "", err
	}
	options := []string{
		"-o", "Dir::Etc::sourcelist=/dev/null", "-o", "Dir::Etc::sourceparts=" + parts,
		"-o", "Dir::State::lists=" + filepath.Join(d.dir, "lists"), "-o", "APT::Sandbox::User=root",
	}
	if _, err := output(ctx, d.dir, "apt-get", slices.Concat(options, []string{"update"})...); err != nil {
		return "", err
	}
	if _, err := output(ctx, filepath.Join(d.dir, "sources"), "apt-get", slices.Concat(options, []string{"source", "--download-only", name})...); err != nil {
		return "", err
	}
	found, err := filepath.Glob(pattern)
	if err == nil && len(found) == 0 {
		err = fmt.Errorf("apt-get source %s left no upstream archive in %s", name, d.dir)
	}
	return first(found), err
}

func first(s []string) string {
	if len(s) == 0 {
		return ""
	}
	return s[0]
}

// sourceLists writes the machine's Debian archives as archives of sources.
func sourceLists(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	files, err := filepath.Glob("/etc/apt/sources.list.d/*.sources")
	if err != nil {
		return err
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		if !bytes.Contains(text, []byte("debian.org")) {
			continue
		}
		text = regexp.MustCompile(`(?m)^Types:.*$`).ReplaceAll(text, []byte("Types: deb-src"))
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(f)), text, 0o644); err != nil {
			return err
		}
	}
	return classicList("/etc/apt/sources.list", filepath.Join(dir, "main.list"))
}

func classicList(from, to string) error {
	f, err := os.Open(from)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	var b strings.Builder
	for s := bufio.NewScanner(f); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), "deb "); ok {
			b.WriteString("deb-src " + rest + "\n")
		}
	}
	return os.WriteFile(to, []byte(b.String()), 0o644)
}

// output runs a program and returns what it prints; its error says what the
// program said.
func output(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		text := append(out, said.Bytes()...)
		if len(text) > 2000 {
			text = text[len(text)-2000:]
		}
		return nil, fmt.Errorf("%s %s: %w:\n%s", name, strings.Join(args, " "), err, text)
	}
	return out, nil
}
