package local

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/storagetest"
)

// a host's datastores, in directories below base, which hosts share.
func testConfig(t testing.TB, base, host, format string) DisksConfig {
	t.Helper()
	key := filepath.Join(base, "key")
	if err := os.WriteFile(key, []byte("a key for a test, 32 bytes long."), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"own-" + host, "shared"} {
		if err := os.MkdirAll(filepath.Join(base, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	policy := func(name string, change func(*DatastorePolicy)) DatastorePolicy {
		p := DatastorePolicy{Policy: storage.Policy{Name: name}}
		change(&p)
		return p
	}
	return DisksConfig{
		Host: host, StateDir: filepath.Join(base, "state-"+host), BootID: "boot-1-of-" + host,
		Datastores: []Datastore{
			{Name: "own", Path: filepath.Join(base, "own-"+host), Format: format, Policies: []DatastorePolicy{
				policy("thin", func(p *DatastorePolicy) { p.IOPS, p.BytesPerSecond = 1000, 64<<20 }),
				policy("thick", func(p *DatastorePolicy) { p.Thick = true }),
				policy("sealed", func(p *DatastorePolicy) { p.Encrypted, p.KeyFile = true, key }),
			}},
			{Name: "shared", Path: filepath.Join(base, "shared"), Shared: true, Format: format, Policies: []DatastorePolicy{
				policy("anywhere", func(*DatastorePolicy) {}),
			}},
		},
	}
}

// scratch is a directory in memory, if there is one: what is tested on it syncs
// much, and waits for no disk.
func scratch(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "atoll-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func openTest(t testing.TB, c DisksConfig) *Disks {
	t.Helper()
	d, err := OpenDisks(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// qemuTool runs a tool of QEMU's on a volume, which it opens as a driver would.
func qemuTool(t testing.TB, a storage.Attachment, tool string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(tool)
	if err != nil {
		t.Fatalf("%v: apt-get install qemu-utils", err)
	}
	cmd := exec.CommandContext(t.Context(), path)
	cmd.Args = append(cmd.Args, args...)
	if a.Key != nil {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if _, err := w.Write(a.Key); err != nil {
			t.Fatal(err)
		}
		w.Close()
		cmd.ExtraFiles = []*os.File{r}
	}
	out, err := cmd.CombinedOutput()
	if err != nil || strings.Contains(string(out), "failed") {
		t.Fatalf("%s %q: %v\n%s", tool, args, err, out)
	}
}

// imageOf is a volume as QEMU's tools are told of it.
func imageOf(a storage.Attachment) []string {
	image := "driver=" + a.Format + ",file.driver=file,file.filename=" + a.Path
	prefix := "backing."
	for _, b := range a.Backing {
		image += "," + prefix + "driver=" + b.Format + "," + prefix + "file.driver=file," + prefix + "file.filename=" + b.Path
		prefix += "backing."
	}
	if a.Key != nil {
		return []string{"--object", keyObject, "--image-opts", image + ",key-secret=key"}
	}
	return []string{"--image-opts", image}
}

func writeContent(t *testing.T, a storage.Attachment, at int64, data []byte) {
	t.Helper()
	src := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(src, data, 0o600); err != nil {
		t.Fatal(err)
	}
	qemuTool(t, a, "qemu-io", append([]string{"-c", fmt.Sprintf("write -s %s %d %d", src, at, len(data)), "-c", "flush"}, imageOf(a)...)...)
}

func readContent(t *testing.T, a storage.Attachment, at, n int64) []byte {
	t.Helper()
	raw := filepath.Join(t.TempDir(), "raw")
	image := imageOf(a)
	qemuTool(t, a, "qemu-img", append(append([]string{"convert", "-O", "raw"}, image...), raw)...)
	f, err := os.Open(raw)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDisks(t *testing.T) {
	for _, format := range []string{storage.FormatRaw, storage.FormatQCOW2} {
		t.Run(format, func(t *testing.T) {
			bases := map[*testing.T]string{}
			encrypted := "sealed"
			if format == storage.FormatQCOW2 { // they are LUKS files in both
				encrypted = ""
			}
			storagetest.TestDisks(t, storagetest.Disks{
				Open: func(t *testing.T, host string) storage.Disks {
					if bases[t] == "" {
						bases[t] = t.TempDir()
					}
					return openTest(t, testConfig(t, bases[t], host, format))
				},
				Thin: "thin", Thick: "thick", Encrypted: encrypted, Shared: "anywhere", KeyedByClaim: encrypted != "",
				Write: writeContent, Read: readContent,
				LiveSnapshots: format == storage.FormatRaw && canReflink(t),
			})
		})
	}
}

// canReflink says whether the file system of tests shares blocks.
func canReflink(t *testing.T) bool {
	a, err := os.Create(filepath.Join(t.TempDir(), "a"))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	b, err := os.Create(filepath.Join(t.TempDir(), "b"))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	return unix.IoctlFileClone(int(b.Fd()), int(a.Fd())) == nil
}
