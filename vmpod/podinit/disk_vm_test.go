package podinit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/storage/mkfs"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// A testDisk is one that outlives VMs.
type testDisk struct {
	id, file string
	readOnly bool
}

func newDisk(t *testing.T, dir, id string, size int64) testDisk {
	t.Helper()
	d := testDisk{id: id, file: filepath.Join(dir, id)}
	if err := errors.Join(os.WriteFile(d.file, nil, 0o600), os.Truncate(d.file, size)); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d testDisk) args() []string {
	ro := map[bool]string{true: "on", false: "off"}[d.readOnly]
	return []string{
		"-drive", "if=none,id=" + d.id + ",format=raw,discard=unmap,file=" + d.file + ",read-only=" + ro,
		"-device", "virtio-blk-pci,drive=" + d.id + ",serial=" + d.id,
	}
}

func (d testDisk) put(t *testing.T, at int64, data string) {
	t.Helper()
	f, err := os.OpenFile(d.file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt([]byte(data), at)
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

func (d testDisk) sum(t *testing.T) [32]byte {
	t.Helper()
	b, err := os.ReadFile(d.file)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// addDisk adds a volume, formatting its disk if it is blank, and says whether it
// was.
func (g guestOps) addDisk(d *agentapi.VolumeDisk, change ...func(*agentapi.AddVolumeRequest)) (formatted bool) {
	g.t.Helper()
	r := &agentapi.AddVolumeRequest{Id: "v-" + d.Serial, Kind: agentapi.AddVolumeRequest_DISK, Disk: d}
	for _, c := range change {
		c(r)
	}
	resp, err := g.AddVolume(g.ctx, r)
	if err != nil {
		g.t.Fatal(err)
	}
	if !resp.Blank {
		return false
	}
	m, err := mkfs.New(g.t.TempDir())
	if err != nil {
		g.t.Fatal(err)
	}
	var b bytes.Buffer
	err = m.Format(g.ctx, d.FsType, resp.Bytes, d.Noise, func(at, length int64, data []byte) error {
		return agentapi.WriteExtent(&b, agentapi.Extent{Offset: at, Length: length, Data: data})
	})
	if err != nil {
		g.t.Fatal(err)
	}
	if err := g.Format(g.ctx, r.Id, io.LimitReader(&b, int64(b.Len()/2))); err == nil {
		g.t.Fatal("half of a file system was taken")
	}
	if again, err := g.AddVolume(g.ctx, r); err != nil || !again.Blank {
		g.t.Fatalf("after half of a formatting: %v, %v", again, err)
	}
	b.Reset()
	err = m.Format(g.ctx, d.FsType, resp.Bytes, d.Noise, func(at, length int64, data []byte) error {
		return agentapi.WriteExtent(&b, agentapi.Extent{Offset: at, Length: length, Data: data})
	})
	if err != nil {
		g.t.Fatal(err)
	}
	if err := g.Format(g.ctx, r.Id, &b); err != nil {
		g.t.Fatal(err)
	}
	if resp, err := g.AddVolume(g.ctx, r); err != nil || resp.Blank {
		g.t.Fatalf("after formatting: %v, %v", resp, err)
	}
	return true
}

// mounts gives a container volumes, as ID=PATH or ID/SUB=PATH.
func mounts(list ...string) func(*agentapi.CreateContainerRequest) {
	return func(r *agentapi.CreateContainerRequest) {
		for _, m := range list {
			source, path, _ := strings.Cut(m, "=")
			id, sub, _ := strings.Cut(source, "/")
			r.Mounts = append(r.Mounts, &agentapi.VolumeMount{Volume: id, SubPath: sub, Destination: path})
		}
	}
}

func (g guestOps) has(out string, want ...string) {
	g.t.Helper()
	for _, w := range want {
		if !strings.Contains(out, w) {
			g.t.Errorf("%q is missing in:\n%s", w, out)
		}
	}
}

// TestDisks keeps data over two VMs, of which the first is cut off.
func TestDisks(t *testing.T) {
	need(t, "mkfs.xfs", "xfsprogs")
	dir := t.TempDir()
	ext, xfs, raw := newDisk(t, dir, "ext", 256<<20), newDisk(t, dir, "xfs", 320<<20), newDisk(t, dir, "raw", 16<<20)
	noise := newDisk(t, dir, "noise", 64<<20)
	noise.put(t, 1<<20, strings.Repeat("noise...", 63<<17))
	taken := takenDisks(t, dir)
	var args []string
	for _, d := range append([]testDisk{ext, xfs, raw, noise}, taken...) {
		args = append(args, d.args()...)
	}
	vm := bootVM(t, args...)
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	g := guestOps{vm.attach(), t, ctx}
	if _, err := g.SetupSandbox(ctx, setupRequest()); err != nil {
		t.Fatal(err)
	}
	testTakenDisks(g, taken)

	group := func(r *agentapi.AddVolumeRequest) { r.HasFsGroup, r.FsGroup = true, 2000 }
	if !g.addDisk(&agentapi.VolumeDisk{Serial: "ext", FsType: "ext4", Options: []string{"noatime"}}, group) ||
		!g.addDisk(&agentapi.VolumeDisk{Serial: "xfs", FsType: "xfs"}) || !g.addDisk(&agentapi.VolumeDisk{Serial: "noise", FsType: "ext4", Noise: true}) {
		t.Error("a blank disk was not formatted")
	}
	g.addDisk(&agentapi.VolumeDisk{Serial: "raw", Block: true})
	if err := g.Format(ctx, "v-ext", strings.NewReader("")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("formatting what is mounted: %v", err)
	}
	testDiskUse(g)
	out, _ := g.run("scheduler", ociSpec("sh", "-c", `for d in /sys/block/vd*; do case $(cat $d/serial) in ext|raw) cat $d/queue/scheduler;; esac; done`), nil)
	if n := strings.Count(out, "[none]"); n != 2 {
		t.Errorf("of 2 disks %d have no scheduler: %q", n, out)
	}
	testDiskGrowth(vm, g, ext, xfs)

	// It goes and comes again, and what is on it is checked meanwhile.
	for _, id := range []string{"v-ext", "v-noise"} {
		if _, err := g.RemoveVolume(ctx, &agentapi.RemoveVolumeRequest{Id: id}); err != nil {
			t.Fatal(err)
		}
	}
	run1(t, "e2fsck", "-fn", ext.file)
	if g.addDisk(&agentapi.VolumeDisk{Serial: "ext", FsType: "ext4"}) {
		t.Error("a disk with data was formatted")
	}
	out, _ = g.run("late", ociSpec("sh", "-c", "cat /e/note && echo second > /e/second && echo second > /x/second && sync; dd if=/dev/zero of=/x/more bs=1M count=4 2>/dev/null"), mounts("v-ext=/e", "v-xfs=/x"))
	g.has(out, "kept")
	vm.end() // as if the power failed
	cut := testDisk{id: "cut", file: filepath.Join(dir, "cut")}
	run1(t, "cp", "--sparse=always", xfs.file, cut.file)
	testNextVM(t, ext, xfs, raw, noise, cut)
}

// takenDisks have something on them.
func takenDisks(t *testing.T, dir string) []testDisk {
	var disks []testDisk
	for i, s := range []signature{
		{"", 64<<10 + 64, "_BHRfS_M"}, {"", 0, "LUKS\xba\xbe"}, {"", 512, "EFI PART"}, {"", 512, "LABELONE"}, {"", 4086, "SWAPSPACE2"},
		{"", 0, "XFSB"}, {"", 1<<20 - 1, "x"}, {"", 16<<20 - 1, "x"},
	} {
		d := newDisk(t, dir, fmt.Sprintf("taken%d", i), 16<<20)
		d.put(t, int64(s.offset), s.magic)
		disks = append(disks, d)
	}
	return disks
}

// testTakenDisks wants ext4 on disks that have something else.
func testTakenDisks(g guestOps, disks []testDisk) {
	for _, d := range disks {
		before := d.sum(g.t)
		resp, err := g.AddVolume(g.ctx, &agentapi.AddVolumeRequest{Id: "v-" + d.id, Kind: agentapi.AddVolumeRequest_DISK, Disk: &agentapi.VolumeDisk{Serial: d.id, FsType: "ext4"}})
		if !errdefs.IsFailedPrecondition(err) {
			g.t.Errorf("%s: %v, %v", d.id, resp, err)
		}
		if err := g.Format(g.ctx, "v-"+d.id, strings.NewReader("")); !errdefs.IsFailedPrecondition(err) {
			g.t.Errorf("%s: formatting: %v", d.id, err)
		}
		if d.sum(g.t) != before {
			g.t.Errorf("%s was written to", d.id)
		}
	}
}

// testDiskUse is what containers do with their volumes.
func testDiskUse(g guestOps) {
	script := `stat -c "root %g %a" /e; echo kept > /e/note; stat -c "note %g" /e/note; ls /sub; echo deep > /sub/file; echo kept > /x/note
dd if=/dev/zero of=/x/fill bs=1M 2>&1 | grep -o "No space left on device"; rm /x/fill
head -c 4096 /dev/zero | tr "\0" r > /dev/data; head -c 3 /dev/data; echo; stat -c "%F" /dev/data; echo n > /n/note; exec sleep 1000`
	g.create("one", ociSpec("sh", "-c", script), func(r *agentapi.CreateContainerRequest) {
		mounts("v-ext=/e", "v-ext/deep/er=/sub", "v-xfs=/x", "v-noise=/n")(r)
		r.Devices = []*agentapi.VolumeDevice{{Volume: "v-raw", Path: "/dev/data", Permissions: "rwm"}}
	})
	g.start("one")
	two, exit := g.run("two", ociSpec("sh", "-c", "while ! test -s /n/note; do sleep 0.1; done; cat /e/note; cat /e/deep/er/file"), mounts("v-ext=/e", "v-noise=/n"))
	if exit.ExitCode != 0 {
		g.t.Errorf("another container of the pod: %v", exit)
	}
	g.has(two, "kept", "deep")
	if _, err := g.RemoveVolume(g.ctx, &agentapi.RemoveVolumeRequest{Id: "v-ext"}); !errdefs.IsFailedPrecondition(err) {
		g.t.Errorf("removing what is used: %v", err)
	}
	bad, _ := g.run("bad", ociSpec("sh", "-c", "cat /dev/data 2>&1 | head -c 80; ls /dev"), nil)
	if strings.Contains(bad, "data") && !strings.Contains(bad, "No such file") {
		g.t.Errorf("a container without the device sees %s", bad)
	}
	if _, err := g.SignalProcess(g.ctx, &agentapi.SignalProcessRequest{ContainerId: "one", Signal: 9}); err != nil {
		g.t.Fatal(err)
	}
	g.wait("one", "")
	g.has(g.logs("one"), "root 2000 2775", "note 2000", "No space left on device", "rrr", "block special file")
	g.remove("one")
	g.ro()
}

// ro wants what does not fit the devices.
func (g guestOps) ro() {
	_, err := g.AddVolume(g.ctx, &agentapi.AddVolumeRequest{Id: "v-x", Kind: agentapi.AddVolumeRequest_DISK, Disk: &agentapi.VolumeDisk{Serial: "raw", Block: true, ReadOnly: true}})
	if !errdefs.IsFailedPrecondition(err) {
		g.t.Errorf("a read-only volume on a disk that can be written: %v", err)
	}
	b := mustJSON(g.t, ociSpec("true"))
	_, err = g.CreateContainer(g.ctx, &agentapi.CreateContainerRequest{Id: "m", Spec: b, ImageDisk: "img", Mounts: []*agentapi.VolumeMount{{Volume: "v-raw", Destination: "/m"}}})
	if !errdefs.IsFailedPrecondition(err) {
		g.t.Errorf("a raw volume as a mount: %v", err)
	}
}

func (g guestOps) usage(id string) *agentapi.FilesystemStats {
	g.t.Helper()
	s, err := g.Stats(g.ctx, &agentapi.StatsRequest{})
	if err != nil {
		g.t.Fatal(err)
	}
	for _, v := range s.Volumes {
		if v.Id == id {
			return v.Usage
		}
	}
	g.t.Fatalf("no statistics of %s", id)
	return nil
}

// testDiskGrowth grows disks under mounted file systems.
func testDiskGrowth(vm *testVM, g guestOps, disks ...testDisk) {
	if u := g.usage("v-raw"); u.CapacityBytes != 16<<20 {
		g.t.Errorf("raw: %v", u)
	}
	for _, d := range disks {
		before := g.usage("v-" + d.id)
		if before.Inodes == 0 || before.UsedInodes == 0 || before.UsedBytes == 0 || before.AvailableBytes == 0 {
			g.t.Errorf("%s: %v", d.id, before)
		}
		vm.command("block_resize " + d.id + " 1G")
		r, err := g.ExpandVolume(g.ctx, &agentapi.ExpandVolumeRequest{Id: "v-" + d.id, Bytes: 1 << 30})
		if err != nil || r.Bytes != 1<<30 {
			g.t.Errorf("expand %s: %v, %v", d.id, r, err)
		}
		if u := g.usage("v-" + d.id); u.CapacityBytes < 900<<20 || u.Inodes <= before.Inodes {
			g.t.Errorf("%s has grown from %v to %v", d.id, before, u)
		}
	}
}

// testNextVM opens what the first VM left.
func testNextVM(t *testing.T, ext, xfs, raw, clean, cut testDisk) {
	raw.readOnly, clean.readOnly, cut.readOnly = true, true, true
	var args []string
	for _, d := range []testDisk{ext, xfs, raw, clean, cut} {
		args = append(args, d.args()...)
	}
	vm := bootVM(t, args...)
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	g := guestOps{vm.attach(), t, ctx}
	r := setupRequest()
	r.Sysctls = nil
	r.UserNamespace = &agentapi.IDMap{First: 5000, Length: 65536}
	if _, err := g.SetupSandbox(ctx, r); err != nil {
		t.Fatal(err)
	}
	for _, d := range []*agentapi.VolumeDisk{
		{Serial: "ext", FsType: "ext4"}, {Serial: "xfs", FsType: "xfs"},
		{Serial: "noise", FsType: "ext4", ReadOnly: true, Noise: true}, {Serial: "raw", Block: true, ReadOnly: true},
	} {
		if g.addDisk(d) {
			t.Error("a disk with data was formatted")
		}
	}
	before := cut.sum(t)
	_, err := g.AddVolume(ctx, &agentapi.AddVolumeRequest{Id: "v-cut", Kind: agentapi.AddVolumeRequest_DISK, Disk: &agentapi.VolumeDisk{Serial: "cut", FsType: "xfs", ReadOnly: true}})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "journal") || cut.sum(t) != before {
		t.Errorf("a read-only disk with a journal: %v", err)
	}
	out, _ := g.run("a", ociSpec("sh", "-c", `cat /e/note /e/second /x/note /x/second /n/note; stat -c "%n %u" /e/note; touch /e/new && stat -c "%n %u" /e/new; touch /n/new || echo kept from writing`),
		mounts("v-ext=/e", "v-xfs=/x", "v-noise=/n"))
	g.has(out, "kept\nsecond\nkept\nsecond\nn\n", "/e/note 0", "/e/new 0", "Read-only file system", "kept from writing")
	for _, id := range []string{"v-ext", "v-xfs", "v-raw", "v-noise"} {
		if _, err := g.RemoveVolume(ctx, &agentapi.RemoveVolumeRequest{Id: id}); err != nil {
			t.Error(err)
		}
	}
	vm.end()
	run1(t, "e2fsck", "-fn", ext.file)
	run1(t, "xfs_repair", "-nf", xfs.file)
}
