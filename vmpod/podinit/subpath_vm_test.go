package podinit

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/storage/mkfs"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// formatted puts an empty ext4 on a disk, from the host.
func (d testDisk) formatted(t *testing.T) testDisk {
	t.Helper()
	m, err := mkfs.New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(d.file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	err = m.Format(t.Context(), "ext4", fi.Size(), false, func(at, _ int64, data []byte) error {
		_, err := f.WriteAt(data, at) // what is not written is zero already
		return err
	})
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestPrepareSubPath asks for sub-paths before any container has them.
func TestPrepareSubPath(t *testing.T) {
	dir := t.TempDir()
	data, ro, raw := newDisk(t, dir, "data", 64<<20), newDisk(t, dir, "ro", 64<<20).formatted(t), newDisk(t, dir, "raw", 16<<20)
	ro.readOnly = true
	var args []string
	for _, d := range []testDisk{data, ro, raw} {
		args = append(args, d.args()...)
	}
	vm := bootVM(t, args...)
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	g := guestOps{vm.attach(), t, ctx}
	if _, err := g.SetupSandbox(ctx, setupRequest()); err != nil {
		t.Fatal(err)
	}
	group := func(r *agentapi.AddVolumeRequest) { r.HasFsGroup, r.FsGroup = true, 2000 }
	g.addDisk(&agentapi.VolumeDisk{Serial: "data", FsType: "ext4"}, group)
	g.addDisk(&agentapi.VolumeDisk{Serial: "ro", FsType: "ext4", ReadOnly: true})
	g.addDisk(&agentapi.VolumeDisk{Serial: "raw", Block: true})
	for _, r := range []*agentapi.AddVolumeRequest{
		{Id: "empty", Kind: agentapi.AddVolumeRequest_EMPTY_DIR, HasFsGroup: true, FsGroup: 3000},
		{Id: "conf", Kind: agentapi.AddVolumeRequest_TREE},
	} {
		if _, err := g.AddVolume(ctx, r); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.PutTree(ctx, "conf", treeTar(t, "..1", map[string]string{"key": "value"}, nil)); err != nil {
		t.Fatal(err)
	}
	g.run("hostile", ociSpec("sh", "-ec", `cd /d; mkdir real; echo text > file; ln -s real inside
ln -s /bin absolute; ln -s /bin/sh program; ln -s /bin/none none; ln -s ../ up; ln -s ../../../../.. far; ln -s loop loop; ln -s missing dangling
mkdir nest; ln -s /etc nest/deep; ln -s /proc/self/root proc; mkfifo pipe`), mounts("v-data=/d"))

	testSubPathsRefused(g)
	testSubPathsMade(g)
	testSubPathSwapped(g)

	// Nothing of it is held: what no container uses can go.
	for _, id := range []string{"v-data", "v-ro", "empty", "conf"} {
		if _, err := g.RemoveVolume(ctx, &agentapi.RemoveVolumeRequest{Id: id}); err != nil {
			t.Errorf("remove %s: %v", id, err)
		}
	}
}

func (g guestOps) prepareSubPath(volume, sub string) error {
	g.t.Helper()
	_, err := g.PrepareSubPath(g.ctx, &agentapi.PrepareSubPathRequest{Volume: volume, SubPath: sub})
	return err
}

// testSubPathsRefused wants each refusal to have its class, to name the
// sub-path and to say what is wrong; and nothing to be made by it.
func testSubPathsRefused(g guestOps) {
	out, invalid := "leads out of the volume", errdefs.ErrInvalidArgument
	for _, c := range []struct {
		volume, sub string
		class       error
		says        string
	}{
		{"v-data", "absolute", invalid, out},
		{"v-data", "absolute/new", invalid, out},
		{"v-data", "program", invalid, out},
		{"v-data", "none", invalid, out},
		{"v-data", "up", invalid, out},
		{"v-data", "up/new", invalid, out},
		{"v-data", "far/tmp/new", invalid, out},
		{"v-data", "nest/deep/new", invalid, out},
		{"v-data", "proc/tmp", invalid, out},
		{"v-data", "..", invalid, out},
		{"v-data", "made/../../new", invalid, out},
		{"v-data", "/etc", invalid, out},
		{"v-data", "", invalid, out},
		{"v-data", "loop", invalid, "without end"},
		{"v-data", "file/below", invalid, "no directory"},
		{"v-data", strings.Repeat("x", 300), invalid, "too long"},
		{"v-data", "dangling", errdefs.ErrFailedPrecondition, "not there"},
		{"v-data", "dangling/new", errdefs.ErrFailedPrecondition, "not there"},
		{"v-ro", "new", errdefs.ErrFailedPrecondition, "read-only"},
		{"v-ro", "lost+found/new", errdefs.ErrFailedPrecondition, "read-only"},
		{"v-raw", "a", errdefs.ErrFailedPrecondition, "raw device"},
		{"other", "a", errdefs.ErrNotFound, "AddVolume first"},
		{"../v-data", "a", invalid, "volume id"},
	} {
		err := g.prepareSubPath(c.volume, c.sub)
		if !errors.Is(err, c.class) || !strings.Contains(err.Error(), c.says) {
			g.t.Errorf("%s/%s: %v, want %v with %q", c.volume, c.sub, err, c.class, c.says)
		}
	}
	seen, _ := g.run("seen", ociSpec("sh", "-c", "ls -A /d /d/nest; ls /bin/none /etc/new /tmp/new /proc/1/root/tmp/new 2>/dev/null"), mounts("v-data=/d"))
	if strings.Contains(seen, "new") || strings.Contains(seen, "missing") {
		g.t.Errorf("a refused sub-path was made:\n%s", seen)
	}
}

// testSubPathsMade makes sub-paths, twice, and looks at them.
func testSubPathsMade(g guestOps) {
	for _, c := range [][2]string{
		{"v-data", "made/by/us"}, {"v-data", "inside/made"}, {"v-data", "file"}, {"v-data", "real"}, {"v-data", "pipe"},
		{"v-ro", "lost+found"}, {"empty", "a/b"}, {"conf", "key"}, {"conf", "none"},
	} {
		for range 2 {
			if err := g.prepareSubPath(c[0], c[1]); err != nil {
				g.t.Errorf("%s/%s: %v", c[0], c[1], err)
			}
		}
	}
	out, _ := g.run("made", ociSpec("sh", "-c", `cd /d; stat -c "%n %a %g" made made/by made/by/us real/made; stat -c "%n %a %g" /e/a/b; cat /sub; cat /key; echo; ls /none; rmdir /d/real/made`),
		mounts("v-data=/d", "empty=/e", "v-data/file=/sub", "conf/key=/key", "conf/none=/none"))
	g.has(out, "made 2775 2000\n", "made/by 2775 2000\n", "made/by/us 2775 2000\n", "real/made 2775 2000\n", "/e/a/b 2777 3000\n", "text\n", "value\n")
}

// testSubPathSwapped has a sub-path become a link after it was found well:
// CreateContainer looks again. Once cured, the container is made.
func testSubPathSwapped(g guestOps) {
	if err := g.prepareSubPath("v-data", "swapped"); err != nil {
		g.t.Fatal(err)
	}
	g.run("swap", ociSpec("sh", "-ec", "cd /d; rmdir swapped; ln -s /etc swapped"), mounts("v-data=/d"))
	r := &agentapi.CreateContainerRequest{Id: "late", Spec: mustJSON(g.t, ociSpec("true")), ImageDisk: "img"}
	mounts("v-data/swapped=/s")(r)
	if _, err := g.CreateContainer(g.ctx, r); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "leads out of the volume") {
		g.t.Errorf("a sub-path that was swapped: %v", err)
	}
	if err := g.prepareSubPath("v-data", "swapped"); !errdefs.IsInvalidArgument(err) {
		g.t.Errorf("looked at again: %v", err)
	}
	g.run("cure", ociSpec("sh", "-ec", "cd /d; rm swapped"), mounts("v-data=/d"))
	if err := g.prepareSubPath("v-data", "swapped"); err != nil {
		g.t.Errorf("cured: %v", err)
	}
	out, _ := g.run("cured", ociSpec("sh", "-c", `stat -c "%a %g" /s`), mounts("v-data/swapped=/s"))
	g.has(out, "2775 2000")
}
