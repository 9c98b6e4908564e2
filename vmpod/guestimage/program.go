package guestimage

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

// programEntries returns the program called name (found on PATH) as
// /usr/bin/<name>, with its dynamic loader and every shared library it needs.
//
// All libraries go into the directory in which libc was found: that one is
// compiled into the loader, so the image needs no ld.so.cache.
func programEntries(name, pkg string) ([]entry, error) {
	file, err := exec.LookPath(name)
	if err != nil {
		return nil, fmt.Errorf("guest image: %s is not installed: run `apt-get install %s`: %w", name, pkg, errdefs.ErrNotFound)
	}
	interp, libs, err := sharedLibraries(file, librarySearchPath("/"))
	if err != nil {
		return nil, fmt.Errorf("guest image: %s: %w", file, err)
	}
	program, err := fileEntry("/usr/bin/"+name, file, 0o755)
	if err != nil {
		return nil, err
	}
	entries := []entry{program}
	if interp != "" {
		e, err := fileEntry(filepath.Clean(interp), interp, 0o755)
		if err != nil {
			return nil, err
		}
		entries = append(entries, e)
	}
	dir := "/lib"
	for _, l := range libs {
		if strings.HasPrefix(l.soname, "libc.so") || strings.HasPrefix(l.soname, "libc.musl") {
			dir = filepath.Dir(l.file)
		}
	}
	for _, l := range libs {
		if l.soname == filepath.Base(interp) {
			continue // the loader itself, already there
		}
		dst := filepath.Join(dir, l.soname)
		e, err := fileEntry(dst, l.file, 0o755)
		if err != nil {
			return nil, err
		}
		entries = append(entries, e)
	}
	return entries, nil
}

func fileEntry(dst, src string, perm uint32) (entry, error) {
	data, err := os.ReadFile(src)
	if err != nil {
		return entry{}, fmt.Errorf("guest image: %w", err)
	}
	return entry{path: dst, mode: modeFile | perm, data: data, from: src}, nil
}

type library struct{ soname, file string }

// sharedLibraries follows DT_NEEDED from the program file. interp is empty for
// a static program.
func sharedLibraries(file string, search []string) (interp string, libs []library, err error) {
	seen := map[string]bool{}
	queue := []string{file}
	for len(queue) > 0 {
		obj := queue[0]
		queue = queue[1:]
		f, err := elf.Open(obj)
		if err != nil {
			return "", nil, fmt.Errorf("%s: %w", obj, err)
		}
		needed, nerr := f.ImportedLibraries()
		own, rerr := runPath(f, obj)
		if obj == file {
			interp, err = interpreter(f)
		}
		machine := f.Machine
		_ = f.Close()
		if err := errors.Join(err, nerr, rerr); err != nil {
			return "", nil, fmt.Errorf("%s: %w", obj, err)
		}
		for _, soname := range needed {
			if seen[soname] {
				continue
			}
			seen[soname] = true
			path, err := findLibrary(soname, machine, append(own, search...))
			if err != nil {
				return "", nil, fmt.Errorf("%s needs %s: %w", obj, soname, err)
			}
			libs = append(libs, library{soname, path})
			queue = append(queue, path)
		}
	}
	return interp, libs, nil
}

func interpreter(f *elf.File) (string, error) {
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP || p.Filesz > 4096 {
			continue
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			return "", err
		}
		return strings.TrimRight(string(b), "\x00"), nil
	}
	return "", nil
}

// runPath returns the object's own search path, $ORIGIN resolved.
func runPath(f *elf.File, obj string) ([]string, error) {
	var dirs []string
	for _, tag := range []elf.DynTag{elf.DT_RUNPATH, elf.DT_RPATH} {
		values, err := f.DynString(tag)
		if err != nil {
			return nil, err
		}
		for _, v := range values {
			for _, d := range strings.Split(v, ":") {
				d = strings.NewReplacer("$ORIGIN", filepath.Dir(obj), "${ORIGIN}", filepath.Dir(obj)).Replace(d)
				if filepath.IsAbs(d) {
					dirs = append(dirs, filepath.Clean(d))
				}
			}
		}
	}
	return dirs, nil
}

// findLibrary looks for a library of the same machine, as the loader does: a
// 32-bit namesake does not count.
func findLibrary(soname string, machine elf.Machine, search []string) (string, error) {
	if filepath.IsAbs(soname) {
		search, soname = []string{filepath.Dir(soname)}, filepath.Base(soname)
	}
	for _, dir := range search {
		p := filepath.Join(dir, soname)
		f, err := elf.Open(p)
		if err != nil {
			continue
		}
		same := f.Machine == machine
		_ = f.Close()
		if same {
			return p, nil
		}
	}
	return "", fmt.Errorf("not found in %s: reinstall its package: %w", strings.Join(search, ":"), errdefs.ErrNotFound)
}

// librarySearchPath is what ldconfig would scan: /etc/ld.so.conf with its
// includes, then the built-in directories.
func librarySearchPath(root string) []string {
	var dirs []string
	seen := map[string]bool{}
	add := func(d string) {
		if d = filepath.Join(root, d); !seen[d] {
			seen[d] = true
			dirs = append(dirs, d)
		}
	}
	// The distribution's own directories come first, so that a stray library
	// in /usr/local cannot get into the image.
	for _, d := range []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"} {
		add(d)
	}
	var conf func(file string, depth int)
	conf = func(file string, depth int) {
		err := eachLine(file, func(line string) {
			line, _, _ = strings.Cut(line, "#")
			line = strings.TrimSpace(line)
			pattern, include := strings.CutPrefix(line, "include ")
			switch {
			case include && depth < 4:
				pattern = strings.TrimSpace(pattern)
				if !filepath.IsAbs(pattern) {
					pattern = filepath.Join("/etc", pattern)
				}
				matches, _ := filepath.Glob(filepath.Join(root, pattern))
				for _, m := range matches {
					conf(m, depth+1)
				}
			case filepath.IsAbs(line):
				add(line)
			}
		})
		_ = err // an absent ld.so.conf only means that there is no further directory
	}
	conf(filepath.Join(root, "etc/ld.so.conf"), 0)
	existing := dirs[:0]
	for _, d := range dirs {
		if _, err := os.Stat(d); !errors.Is(err, fs.ErrNotExist) {
			existing = append(existing, d)
		}
	}
	return existing
}
