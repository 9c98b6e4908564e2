// Mkimages builds Atoll's demo images into an OCI layout:
//
//	go run ./cmd/mkimages -out build/images
//
// atoll.local/web, a web server; atoll.local/busybox, Debian's busybox-static
// with its applets; atoll.local/pause, which does nothing; and
// atoll.local/tree, whose layers hold every awkward thing that a file system
// may. Beside the layout, expected/<image>.jsonl lists what a container should
// see (the treesum command's form). The same inputs give the same bytes; if
// the layout was made from them already it is left alone.
package main

import (
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

func main() {
	out := flag.String("out", "build/images", "`directory` to write the OCI layout to")
	busybox := flag.String("busybox", "", "static busybox `binary`; default: Debian's busybox-static")
	force := flag.Bool("force", false, "build even if the inputs are unchanged")
	flag.Parse()
	if err := run(*out, *busybox, *force); err != nil {
		fmt.Fprintln(os.Stderr, "mkimages:", err)
		os.Exit(1)
	}
}

// version changes with what this program makes of its inputs.
const version = "1"

func run(out, busybox string, force bool) error {
	temp, err := os.MkdirTemp("", "mkimages-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	in, err := gather(temp, busybox)
	if err != nil {
		return err
	}
	stamp := filepath.Join(out, "inputs.sha256")
	if old, err := os.ReadFile(stamp); err == nil && string(old) == in.sum && !force {
		fmt.Println("demo images: nothing changed in", out)
		return nil
	}
	images, err := in.images()
	if err != nil {
		return err
	}
	return write(out, images, in.sum)
}

// inputs are the programs that go into images.
type inputs struct {
	web, pause, treesum, busybox []byte
	applets                      []string // "bin/ls"
	sum                          string
}

func gather(temp, busybox string) (*inputs, error) {
	in := &inputs{}
	for _, p := range []struct {
		pkg string
		to  *[]byte
	}{{"web", &in.web}, {"pause", &in.pause}, {"treesum", &in.treesum}} {
		pkg := "github.com/openatoll/atoll/cmd/mkimages/" + p.pkg
		if p.pkg == "treesum" {
			pkg = "github.com/openatoll/atoll/cmd/treesum"
		}
		path := filepath.Join(temp, p.pkg)
		cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", path, pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
		cmd.Stderr = os.Stderr
		if err := cmd.Run(); err != nil {
			return nil, fmt.Errorf("build %s: %w", pkg, err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		*p.to = data
	}
	if err := in.gatherBusybox(busybox); err != nil {
		return nil, err
	}
	h := sha256.New()
	fmt.Fprintln(h, version, in.applets)
	for _, data := range [][]byte{in.web, in.pause, in.treesum, in.busybox} {
		fmt.Fprintf(h, "%x\n", sha256.Sum256(data))
	}
	in.sum = fmt.Sprintf("%x\n", h.Sum(nil))
	return in, nil
}

func (in *inputs) gatherBusybox(path string) error {
	candidates := []string{path}
	if path == "" {
		candidates = []string{"/bin/busybox", "/usr/bin/busybox"}
	}
	var err error
	for _, path = range candidates {
		if in.busybox, err = os.ReadFile(path); err == nil {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("no busybox: apt-get install busybox-static, or name one with -busybox: %w", err)
	}
	if err := checkStatic(path); err != nil {
		return err
	}
	list, err := exec.Command(path, "--list-full").Output()
	if err != nil {
		return fmt.Errorf("%s --list-full: %w", path, err)
	}
	in.applets = strings.Fields(string(list))
	slices.Sort(in.applets)
	in.applets = slices.DeleteFunc(in.applets, func(a string) bool { return a == "bin/busybox" || strings.Contains(a, "..") })
	if len(in.applets) == 0 {
		return errors.New(path + " lists no applets")
	}
	return nil
}
