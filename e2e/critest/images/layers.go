package images

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A workshop makes the layers, one directory each below root.
type workshop struct {
	debian  *debian
	root    string
	busybox string
}

func (w *workshop) dir(layer string) string { return filepath.Join(w.root, layer) }

// build makes every layer.
func (w *workshop) build(ctx context.Context) error {
	for _, step := range []func(context.Context) error{w.buildBusybox, w.buildNginx, w.buildDebian, w.buildHTTPD, w.buildPrograms} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	for _, m := range markers {
		if err := write(filepath.Join(w.dir("marker-"+m), m), ""); err != nil {
			return err
		}
	}
	return w.buildGroup()
}

// write makes a file, and the directories above it.
func write(path, text string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o644)
}

// writeAll writes the files that texts names below a layer.
func (w *workshop) writeAll(layer string, texts map[string]string) error {
	for name, text := range texts {
		if err := write(filepath.Join(w.dir(layer), name), text); err != nil {
			return err
		}
	}
	return nil
}

// cLibrary is what busybox is linked with, and the resolver's modules.
var cLibrary = []string{"libc.so.6", "libm.so.6", "libresolv.so.2", "libpthread.so.0", "libnss_files.so.2", "libnss_dns.so.2", "libnss_compat.so.2"}

func (w *workshop) buildBusybox(ctx context.Context) error {
	d := w.dir("busybox")
	for dir, mode := range map[string]fs.FileMode{
		"bin": 0o755, "lib": 0o755, "lib64": 0o755, "dev": 0o755, "proc": 0o755, "sys": 0o755, "home": 0o755, "root": 0o700,
		"tmp": 0o777 | fs.ModeSticky, "usr/bin": 0o755, "usr/sbin": 0o755, "var/www": 0o755, "var/spool/mail": 0o755, "etc": 0o755,
	} {
		if err := os.MkdirAll(filepath.Join(d, dir), 0o755); err != nil {
			return err
		}
		if err := os.Chmod(filepath.Join(d, dir), mode); err != nil {
			return err
		}
	}
	files, err := w.debian.packages(ctx, "libc6", "libc-bin")
	if err != nil {
		return err
	}
	libc := filepath.Join(w.root, "..", "libc")
	if err := w.debian.unpack(ctx, libc, files); err != nil {
		return err
	}
	copies := map[string]string{filepath.Join(libc, "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"): "lib64/ld-linux-x86-64.so.2",
		filepath.Join(libc, "usr/bin/getent"): "bin/getent", w.busybox: "bin/busybox"}
	for _, name := range cLibrary {
		copies[filepath.Join(libc, "lib/x86_64-linux-gnu", name)] = "lib/" + name
	}
	for from, to := range copies {
		if err := install(from, filepath.Join(d, to), 0o755); err != nil {
			return err
		}
	}
	list, err := output(ctx, d, w.busybox, "--list")
	if err != nil {
		return err
	}
	for _, applet := range strings.Fields(string(list)) {
		err := os.Link(filepath.Join(d, "bin/busybox"), filepath.Join(d, "bin", applet))
		if err != nil && !os.IsExist(err) {
			return err
		}
	}
	return w.writeAll("busybox", map[string]string{"etc/passwd": users, "etc/group": groups, "etc/hostname": "localhost\n",
		"etc/nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n"})
}

// install copies a file; a symbolic link is followed.
func install(from, to string, mode fs.FileMode) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(to, data, 0o755); err != nil {
		return err
	}
	return os.Chmod(to, mode)
}

// buildNginx puts nginx and its libraries above busybox, whose tools stay.
func (w *workshop) buildNginx(ctx context.Context) error {
	files, err := w.debian.packages(ctx, "usr-is-merged", "nginx")
	if err != nil {
		return err
	}
	files = slices.DeleteFunc(files, func(f string) bool {
		wanted := strings.HasPrefix(f, "lib") || strings.HasPrefix(f, "zlib1g") || strings.HasPrefix(f, "nginx")
		return !wanted || strings.HasPrefix(f, "libc-bin_") || strings.HasPrefix(f, "libpam-") || strings.Contains(f, "-perl_")
	})
	d := w.dir("nginx")
	if err := w.debian.unpack(ctx, d, files); err != nil {
		return err
	}
	for _, dir := range []string{"etc/nginx", "etc/init.d", "lib/systemd", "etc/pam.d"} {
		if err := os.RemoveAll(filepath.Join(d, dir)); err != nil {
			return err
		}
	}
	for _, dir := range []string{"var/lib/nginx", "var/log/nginx", "var/cache/nginx", "run"} {
		if err := os.MkdirAll(filepath.Join(d, dir), 0o755); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{"var/log/nginx/access.log": "/dev/stdout", "var/log/nginx/error.log": "/dev/stderr", "var/run": "/run"} {
		os.Remove(filepath.Join(d, name))
		if err := os.Symlink(target, filepath.Join(d, name)); err != nil {
			return err
		}
	}
	if err := w.writeAll("hostnet-nginx", map[string]string{"etc/nginx/conf.d/default.conf": nginxSite(12003)}); err != nil {
		return err
	}
	return w.writeAll("nginx", map[string]string{
		"etc/passwd": users + "nginx:x:101:101:nginx user:/nonexistent:/bin/false\n", "etc/group": groups + "nginx:x:101:\n",
		"etc/nginx/nginx.conf": nginxConf, "etc/nginx/mime.types": "types { text/html html htm; text/plain txt; }\n",
		"etc/nginx/conf.d/default.conf": nginxSite(80), "usr/share/nginx/html/index.html": nginxPage,
	})
}

// debianBase is what upstream's images that are based on Debian have, as far
// as the suite runs it.
var debianBase = []string{"usr-is-merged", "base-files", "base-passwd", "bash", "coreutils", "dash", "grep", "hostname", "libc-bin", "sed"}

func (w *workshop) buildDebian(ctx context.Context) error {
	files, err := w.debian.packages(ctx, debianBase...)
	if err != nil {
		return err
	}
	d := w.dir("debian")
	if err := w.debian.unpack(ctx, d, files); err != nil {
		return err
	}
	for _, dir := range []string{"dev", "proc", "sys", "root", "tmp", "run", "var/tmp"} {
		if err := os.MkdirAll(filepath.Join(d, dir), 0o755); err != nil {
			return err
		}
	}
	if err := os.Symlink("dash", filepath.Join(d, "bin/sh")); err != nil && !os.IsExist(err) {
		return err
	}
	return w.writeAll("debian", map[string]string{"etc/passwd": users, "etc/group": groups})
}

func (w *workshop) buildHTTPD(ctx context.Context) error {
	base, err := w.debian.packages(ctx, debianBase...)
	if err != nil {
		return err
	}
	all, err := w.debian.packages(ctx, append([]string{"apache2-bin"}, debianBase...)...)
	if err != nil {
		return err
	}
	d := w.dir("httpd")
	all = slices.DeleteFunc(all, func(f string) bool { return slices.Contains(base, f) })
	if err := w.debian.unpack(ctx, d, all); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(d, "usr/local/apache2/logs"), 0o755); err != nil {
		return err
	}
	scripts := map[string]string{"usr/local/apache2/bin/httpd": httpdScript, "usr/local/bin/httpd-foreground": httpdForeground}
	if err := w.writeAll("httpd", scripts); err != nil {
		return err
	}
	for name := range scripts {
		if err := os.Chmod(filepath.Join(d, name), 0o755); err != nil {
			return err
		}
	}
	return w.writeAll("httpd", map[string]string{"usr/local/apache2/conf/httpd.conf": httpdConf,
		"usr/local/apache2/htdocs/index.html": "<html><body><h1>It works!</h1></body></html>\n"})
}

// buildPrograms compiles the programs that come from Go modules.
func (w *workshop) buildPrograms(ctx context.Context) error {
	for _, p := range []struct {
		layer, path, pkg string
		mode             fs.FileMode
	}{
		{"pause", "pause", "github.com/openatoll/atoll/cmd/mkimages/pause", 0o755},
		{"nonewprivs", "usr/local/bin/nnp", "k8s.io/kubernetes/test/images/nonewprivs", 0o755 | fs.ModeSetuid | fs.ModeSetgid},
	} {
		to := filepath.Join(w.dir(p.layer), p.path)
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", to, p.pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if said, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w:\n%s", p.pkg, err, said)
		}
		if err := os.Chmod(to, p.mode); err != nil {
			return err
		}
	}
	return nil
}

// buildGroup defines user 1000 as a member of group 50000, which the tests of
// supplementary groups look for.
func (w *workshop) buildGroup() error {
	home := filepath.Join(w.dir("predefined-group"), "home/default-user")
	if err := os.MkdirAll(home, 0o755); err != nil {
		return err
	}
	if err := os.Chown(home, 1000, 1000); err != nil {
		return err
	}
	return w.writeAll("predefined-group", map[string]string{
		"etc/passwd": users + "default-user:x:1000:1000:Linux User,,,:/home/default-user:/bin/sh\n",
		"etc/group":  groups + "default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n",
	})
}

// archive makes a tar of a directory, the same way every time: sorted, without
// times, with owners, modes and hard links.
func archive(root string) ([]byte, error) {
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	links := map[uint64]string{}
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		return add(tw, path, rel, e, links)
	})
	if err != nil {
		return nil, err
	}
	return b.Bytes(), tw.Close()
}

func add(tw *tar.Writer, path, rel string, e fs.DirEntry, links map[uint64]string) error {
	info, err := e.Info()
	if err != nil {
		return err
	}
	target := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		if target, err = os.Readlink(path); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	h.Name = rel
	if info.IsDir() {
		h.Name += "/"
	}
	h.ModTime, h.AccessTime, h.ChangeTime = time.Unix(0, 0), time.Time{}, time.Time{}
	h.Uname, h.Gname, h.Format = "", "", tar.FormatPAX
	if st, ok := info.Sys().(*syscall.Stat_t); ok && info.Mode().IsRegular() && st.Nlink > 1 {
		if first, ok := links[st.Ino]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		} else {
			links[st.Ino] = rel
		}
	}
	if err := tw.WriteHeader(h); err != nil || h.Typeflag != tar.TypeReg {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(tw, f)
	return err
}
