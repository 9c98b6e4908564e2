package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/vmpodtest"
)

// slowVolume is one of 64 MiB, of which a third is data, whose copy takes some
// seconds: a copy is not faster than the guest may be.
func slowVolume(t *testing.T, dir string) vmpod.Disk {
	t.Helper()
	path := filepath.Join(dir, "slow.raw")
	data := make([]byte, 20<<20)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(data) // never fails
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		err = f.Truncate(64 << 20)
	}
	if err == nil {
		_, err = f.WriteAt(data, 32<<20)
	}
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	return vmpod.Disk{ID: "v-slow", Path: path, Volume: &vmpod.Volume{ID: "slow", BytesPerSecond: 5 << 20}}
}

func target(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestCopyDisk copies volumes of each format while a guest writes to them.
func TestCopyDisk(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a guest")
	}
	dir := t.TempDir()
	volumes := testVolumes(t)
	volumes["slow"] = slowVolume(t, dir)
	_, m := launchHere(t, nil, smallSpec("copies-8a8a"))
	k := vmpodtest.Dial(t, m)
	for _, v := range volumes {
		if err := m.Plug(t.Context(), vmpod.Device{Disk: &v}); err != nil {
			t.Fatal(err)
		}
	}
	k.AskUntil("disks", func(a string) bool { return strings.Count(a, "v-") == len(volumes) })
	t.Run("exactly what was acknowledged", func(t *testing.T) { copyWhileWriting(t, m, k, volumes["slow"]) })
	t.Run("luks", func(t *testing.T) { copySealed(t, m, k, volumes["sealed"]) })
	t.Run("qcow2", func(t *testing.T) { copyLayered(t, m, k, volumes["layered"]) })
	t.Run("refused", func(t *testing.T) {
		for id, is := range map[string]func(error) bool{"v-none": errdefs.IsNotFound, "v-fixed": errdefs.IsFailedPrecondition} {
			if err := m.CopyDisk(t.Context(), id, target(t, filepath.Join(dir, "no-"+id)), nil); !is(err) || !strings.Contains(err.Error(), id) {
				t.Errorf("copy of %s: %v", id, err)
			}
		}
	})
	t.Run("cancelled", func(t *testing.T) { cancelCopy(t, m, dir) })
	t.Run("full", func(t *testing.T) { copyToFull(t, m, k) })
	t.Run("monitor lost", func(t *testing.T) { copyWithoutMonitor(t, m, dir) })
	t.Run("unplugged", func(t *testing.T) { unplugCopied(t, m, dir) })
	if err := m.Plug(t.Context(), vmpod.Device{Disk: ptr(volumes["slow"])}); err != nil {
		t.Fatal(err)
	}
	t.Run("stopped", func(t *testing.T) { stopCopied(t, m, dir) })
}

func ptr[T any](v T) *T { return &v }

// copyWhileWriting has the guest write numbered blocks, each with fsync, before,
// during and after a copy. The copy has those whose write was acknowledged when
// CopyDisk was called, and none that began once it had said that it had begun.
func copyWhileWriting(t *testing.T, m *Machine, k *vmpodtest.Talk, d vmpod.Disk) {
	var begun, acked, before, after atomic.Int64
	stamp := func() {
		n := begun.Add(1)
		if got := k.Ask(fmt.Sprintf("stamp %s %d", d.ID, n)); got != "ok" {
			t.Fatalf("stamp %d: %s", n, got)
		}
		acked.Store(n)
	}
	for range 5 {
		stamp()
	}
	f := target(t, filepath.Join(filepath.Dir(d.Path), "copy.raw"))
	done := make(chan error, 1)
	var total int64
	go func() {
		before.Store(acked.Load())
		done <- m.CopyDisk(context.Background(), d.ID, f, func(_, all int64) {
			after.CompareAndSwap(0, begun.Load())
			total = all
		})
	}()
	for whole := false; !whole; {
		stamp()
		if m.copying(d.ID) != nil && begun.Load()%8 == 0 {
			if err := m.ResizeDisk(t.Context(), d.ID, 128<<20); !errdefs.IsUnavailable(err) {
				t.Errorf("resize while it is copied: %v", err)
			}
		}
		select {
		case err := <-done:
			if whole = true; err != nil {
				t.Fatal(err)
			}
		default:
		}
	}
	written := acked.Load()
	t.Logf("%d stamps were acknowledged before the copy, %d begun when it had begun, %d written when it was whole; %d bytes copied", before.Load(), after.Load(), written, total)
	if written < after.Load()+5 {
		t.Error("the guest wrote nothing while the disk was copied: the test could not fail")
	}
	has := int64(0)
	b := make([]byte, 9)
	for n := int64(1); n <= written; n++ {
		if _, err := f.ReadAt(b, n*4096); err != nil {
			t.Fatal(err)
		}
		switch is := string(b) == fmt.Sprintf("%08d\n", n); {
		case is && has == n-1:
			has = n
		case is:
			t.Errorf("the copy has stamp %d and not %d", n, has+1)
		case !bytes.Equal(b, make([]byte, 9)):
			t.Errorf("the copy has %q as stamp %d", b, n)
		}
	}
	if has < before.Load() || has > after.Load() {
		t.Errorf("the copy has %d stamps, want %d to %d", has, before.Load(), after.Load())
	}
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	if first, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err != nil || first != has && first != has-1 {
		t.Errorf("the first block of the copy has %q, the others end with %d", b, has)
	}
	wantCopied(t, f, d.Path, 32<<20, 64<<20)
	wantNoCopy(t, m)
	if err := m.ResizeDisk(t.Context(), d.ID, 128<<20); err != nil {
		t.Errorf("resize after the copy: %v", err)
	}
	k.AskUntil("disks", func(a string) bool { return strings.Contains(a, d.ID+":262144:0") })
}

// wantCopied compares a part of a copy, and looks that it has its holes.
func wantCopied(t *testing.T, f *os.File, path string, from, to int64) {
	t.Helper()
	o, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	a, b := make([]byte, to-from), make([]byte, to-from)
	_, err1 := f.ReadAt(a, from)
	_, err2 := o.ReadAt(b, from)
	if err := errors.Join(err1, err2); err != nil || !bytes.Equal(a, b) {
		t.Errorf("bytes %d to %d of the copy differ from the volume's (%v)", from, to, err)
	}
	is, err1 := f.Stat()
	was, err2 := o.Stat()
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	if got, want := is.Sys().(*syscall.Stat_t).Blocks*512, was.Sys().(*syscall.Stat_t).Blocks*512; got > want+2<<20 {
		t.Errorf("the copy takes %d bytes on the disk, the volume %d", got, want)
	}
}

// wantNoCopy checks that QEMU has nothing of a copy.
func wantNoCopy(t *testing.T, m *Machine) {
	t.Helper()
	if left := leftOfCopies(t, m); len(left) > 0 {
		t.Errorf("QEMU still has %q", left)
	}
}

func leftOfCopies(t *testing.T, m *Machine) (left []string) {
	t.Helper()
	q, err := m.monitor(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, ask := range []string{"query-jobs", "query-named-block-nodes", "query-fdsets"} {
		var said json.RawMessage
		var args any
		if ask == "query-named-block-nodes" {
			args = map[string]any{"flat": true}
		}
		if err := q.run(t.Context(), ask, args, &said); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{copyPrefix, extentsName("")} {
			if strings.Contains(string(said), `"`+name) {
				left = append(left, ask+": "+name)
			}
		}
	}
	return left
}

func copySealed(t *testing.T, m *Machine, k *vmpodtest.Talk, d vmpod.Disk) {
	if got := k.Ask("mark v-sealed confidential"); got != "ok" {
		t.Fatal(got)
	}
	path := filepath.Join(t.TempDir(), "copy.luks")
	f := target(t, path)
	if err := m.CopyDisk(t.Context(), d.ID, f, nil); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil || !bytes.HasPrefix(b, []byte("LUKS\xba\xbe")) || bytes.Contains(b, []byte("confidential")) {
		t.Errorf("the copy of an encrypted volume begins with %q, or can be read (%v)", b[:8], err)
	}
	image := "driver=luks,key-secret=key,file.driver=file,file.filename=" + path
	out, err := qemuTool(t, volumeKey, "qemu-io", "--object", "secret,id=key,format=raw,file=/proc/self/fd/3", "--image-opts", image, "-c", "read -v 0 16")
	if err != nil || !strings.Contains(out, "confidential") {
		t.Errorf("with the key the copy does not read as the volume: %v\n%s", err, out)
	}
	wantNoCopy(t, m)
	if err := m.ResizeDisk(t.Context(), d.ID, 24<<20); err != nil {
		t.Errorf("resize after the copy: %v", err)
	}
}

func copyLayered(t *testing.T, m *Machine, k *vmpodtest.Talk, d vmpod.Disk) {
	if got := k.Ask("stamp v-layered 40"); got != "ok" {
		t.Fatal(got)
	}
	path := filepath.Join(t.TempDir(), "copy.qcow2")
	mustTool(t, "", "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "not-there.raw", "-F", "raw", path, "8388608")
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := m.CopyDisk(t.Context(), d.ID, f, nil); err != nil {
		t.Fatal(err)
	}
	if got := k.Ask("stamp v-layered 41"); got != "ok" {
		t.Fatal(got)
	}
	raw := filepath.Join(t.TempDir(), "flat.raw")
	mustTool(t, "", "qemu-img", "convert", "-O", "raw", "--image-opts",
		"driver=qcow2,file.driver=file,file.filename="+path+",backing.driver=raw,backing.file.driver=file,backing.file.filename="+d.Volume.Backing[0].Path, raw)
	b, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	if string(b[:9]) != "00000040\n" || string(b[40*4096:40*4096+9]) != "00000040\n" || bytes.Contains(b, []byte("00000041")) {
		t.Errorf("the copy above the file below begins with %q", b[:9])
	}
	alone := filepath.Join(t.TempDir(), "alone.raw")
	mustTool(t, "", "qemu-img", "convert", "-O", "raw", "--image-opts", "driver=qcow2,file.driver=file,file.filename="+path+",backing=", alone)
	if b, err := os.ReadFile(alone); err != nil || bytes.Contains(b, []byte("from below")) {
		t.Errorf("the copy has what is below the volume (%v)", err)
	}
	wantNoCopy(t, m)
}

// cancelCopy ends a copy by its context, after it has begun.
func cancelCopy(t *testing.T, m *Machine, dir string) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	again := make(chan error, 1)
	err := m.CopyDisk(ctx, "v-slow", target(t, filepath.Join(dir, "cancelled")), func(int64, int64) {
		select {
		case again <- m.CopyDisk(t.Context(), "v-slow", nil, nil):
		default:
		}
		cancel()
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a copy that was cancelled: %v", err)
	}
	if err := <-again; !errdefs.IsUnavailable(err) {
		t.Errorf("a second copy at the same time: %v", err)
	}
	wantNoCopy(t, m)
}

// copyToFull copies to where there is no room. The guest, which waits for what
// it overwrites, sees no error.
func copyToFull(t *testing.T, m *Machine, k *vmpodtest.Talk) {
	dir := t.TempDir()
	if err := unix.Mount("atoll-test", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	f := target(t, filepath.Join(dir, "copy"))
	done := make(chan error, 1)
	go func() { done <- m.CopyDisk(context.Background(), "v-slow", f, nil) }()
	for n := 9000; ; n++ {
		if got := k.Ask(fmt.Sprintf("stamp v-slow %d", n)); got != "ok" {
			t.Errorf("the guest's write while its disk cannot be copied: %s", got)
		}
		select {
		case err := <-done:
			if !errdefs.IsResourceExhausted(err) || !errors.Is(err, unix.ENOSPC) {
				t.Errorf("a copy without room: %v", err)
			}
			wantNoCopy(t, m)
			return
		default:
		}
	}
}

// copyWithoutMonitor closes the monitor's connection below a copy.
func copyWithoutMonitor(t *testing.T, m *Machine, dir string) {
	err := m.CopyDisk(t.Context(), "v-slow", target(t, filepath.Join(dir, "unwatched")), func(int64, int64) {
		if q, err := m.monitor(t.Context()); err == nil {
			q.conn.Close()
		}
	})
	if !errdefs.IsUnavailable(err) {
		t.Errorf("a copy that nobody watched: %v", err)
	}
	wantNoCopy(t, m)
}

func unplugCopied(t *testing.T, m *Machine, dir string) {
	begun := make(chan struct{}, 10)
	done := make(chan error, 1)
	f := target(t, filepath.Join(dir, "unplugged"))
	go func() {
		done <- m.CopyDisk(context.Background(), "v-slow", f, func(int64, int64) { begun <- struct{}{} })
	}()
	<-begun
	if err := m.Unplug(t.Context(), "v-slow"); err != nil {
		t.Error(err)
	}
	if err := <-done; !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "unplugged") {
		t.Errorf("the copy of a disk that was unplugged: %v", err)
	}
	wantNoCopy(t, m)
	q, err := m.monitor(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := nodeSize(t.Context(), q, formatName("v-slow")); !errdefs.IsNotFound(err) {
		t.Errorf("QEMU still has the volume open: %v", err)
	}
}

func stopCopied(t *testing.T, m *Machine, dir string) {
	begun := make(chan struct{}, 10)
	done := make(chan error, 1)
	f := target(t, filepath.Join(dir, "stopped"))
	go func() {
		done <- m.CopyDisk(context.Background(), "v-slow", f, func(int64, int64) { begun <- struct{}{} })
	}()
	<-begun
	start := time.Now()
	if err := m.Stop(t.Context(), 0); err != nil {
		t.Error(err)
	}
	if err := <-done; !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "ended") {
		t.Errorf("the copy of a VM's disk that was stopped: %v", err)
	}
	if took := time.Since(start); took > quitPatience {
		t.Errorf("a VM whose disk is copied took %v to stop", took)
	}
	if st, err := m.Status(t.Context()); err != nil || st.Reason != string(vmpod.ExitStopped) {
		t.Errorf("status = %+v, %v", st, err)
	}
}

// TestKilledWhileCopying kills a driver's process at each step of a copy. The
// next driver ends what was left, and can copy, resize and keep the volume.
func TestKilledWhileCopying(t *testing.T) {
	if testing.Short() {
		t.Skip("builds a test binary and starts machines")
	}
	bin := filepath.Join(t.TempDir(), "crash.test")
	if out, err := exec.CommandContext(t.Context(), "go", "test", "-c", "-tags", "failpoints", "-o", bin, ".").CombinedOutput(); err != nil {
		t.Fatalf("go test -c: %v\n%s", err, out)
	}
	for i, p := range []failpoint.Point{failpoint.DiskCopyTarget, failpoint.DiskCopyMapped, failpoint.DiskCopyStarted, failpoint.DiskCopyEnded} {
		t.Run(filepath.Base(string(p)), func(t *testing.T) {
			cfg := testConfig(t)
			dir := t.TempDir()
			v := victim{Config: cfg, Spec: smallSpec(fmt.Sprintf("copied-%d", i)), Disk: slowVolume(t, dir), CopyTo: filepath.Join(dir, "half")}
			v.Config.Logger = nil
			arg, err := json.Marshal(v)
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), bin)
			cmd.Env = append(os.Environ(), victimEnv+"="+string(arg), "ATOLL_FAILPOINT="+string(p)+"=kill")
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != -1 {
				t.Fatalf("the process did not die at %s: %v\n%s", p, err, out)
			}
			if err := os.Remove(v.CopyTo); err != nil { // as the back end does
				t.Fatal(err)
			}
			d := newDriver(t, cfg)
			defer removeTestCgroups(d)
			defer d.Close()
			opened, err := d.Open(t.Context(), v.Spec.ID)
			if err != nil {
				t.Fatal(err)
			}
			m := opened.(*Machine)
			defer m.Remove(context.Background())
			if p != failpoint.DiskCopyStarted { // it is resized before anybody can have looked
				for end := time.Now().Add(time.Minute); len(leftOfCopies(t, m)) > 0; time.Sleep(20 * time.Millisecond) {
					if time.Now().After(end) {
						t.Fatalf("QEMU still has %q", leftOfCopies(t, m))
					}
				}
			}
			for err := error(errdefs.ErrUnavailable); err != nil; { // resume may be at it
				if err = m.ResizeDisk(t.Context(), v.Disk.ID, 96<<20); err != nil && !errdefs.IsUnavailable(err) {
					t.Fatal(err)
				}
			}
			f := target(t, filepath.Join(dir, "whole"))
			if err := m.CopyDisk(t.Context(), v.Disk.ID, f, nil); err != nil {
				t.Fatal(err)
			}
			wantCopied(t, f, v.Disk.Path, 0, 96<<20)
			wantNoCopy(t, m)
		})
	}
}
