package qemu

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/vmpodtest"
)

// launchHere launches s on a driver of the test's own.
func launchHere(t *testing.T, change func(*Config), s vmpod.Spec) (*Driver, *Machine) {
	t.Helper()
	cfg := testConfig(t)
	if change != nil {
		change(&cfg)
	}
	d := newDriver(t, cfg)
	t.Cleanup(func() {
		d.Close()
		removeTestCgroups(d)
	})
	m, err := d.Launch(context.Background(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Remove(context.Background()); err != nil && d.life.Err() == nil {
			t.Error(err)
		}
	})
	return d, m.(*Machine)
}

func smallSpec(uid string) vmpod.Spec {
	return vmpod.Spec{ID: vmpod.ID{PodUID: uid}, CPUs: 1, Memory: 128 << 20}
}

// TestDisksAndNIC boots a guest with a disk of each kind and a NIC. Then it
// fills the host's file system through a sparse disk: the guest must get an
// error and go on, and the host must be told.
func TestDisksAndNIC(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a guest")
	}
	dir := t.TempDir()
	if err := unix.Mount("atoll-test", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	disk := vmpod.Disk{ID: "eph", Path: filepath.Join(dir, "eph")}
	if err := os.WriteFile(disk.Path, []byte("small\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk.Path, 64<<20); err != nil {
		t.Fatal(err)
	}
	s := smallSpec("full-1a2b")
	s.Disks = []vmpod.Disk{disk, vmdkDisk(t)}
	s.NICs = []vmpod.NIC{tapNIC(t)}
	_, m := launchHere(t, nil, s)
	k := vmpodtest.Dial(t, m)
	testVMDKAndNIC(t, k, s.NICs[0])

	if got := k.Ask("write eph 16"); got != "failed" {
		t.Errorf("guest's write of 16 MiB on 4 MiB of host disk: %s", got)
	}
	if got := k.Ask("cpus"); got != "1" {
		t.Errorf("the guest does not go on: %q", got)
	}
	st, err := m.Status(context.Background())
	if err != nil || st.State != vmpod.StateRunning || st.Reason != "HostDiskFull" || !strings.Contains(st.Message, "disk eph") {
		t.Errorf("status after the host's disk was full: %+v, %v", st, err)
	}

	// A VMM that does not answer is unknown, not dead.
	m.d.cfg.Deadline = 200 * time.Millisecond
	if unix.Kill(m.proc.PID, unix.SIGSTOP); !becomes(m.proc.PID, true) {
		t.Error("SIGSTOP is not seen")
	}
	if st, err := m.Status(context.Background()); err != nil || st.State != vmpod.StateUnknown || st.Reason == "" {
		t.Errorf("status of a stopped VMM: %+v, %v", st, err)
	}
	if unix.Kill(m.proc.PID, unix.SIGCONT); !becomes(m.proc.PID, false) {
		t.Error("SIGCONT is not seen")
	}
	m.d.cfg.Deadline = time.Minute
	if st, err := m.Status(context.Background()); err != nil || st.State != vmpod.StateRunning {
		t.Errorf("status when it answers again: %+v, %v", st, err)
	}
}

// A QEMU that has said that the guest runs is believed while it waits for
// something to do; a pause on its monitor is seen all the same.
func TestPausedGuest(t *testing.T) {
	_, m := launchHere(t, nil, smallSpec("paused-1a2b"))
	vmpodtest.Dial(t, m).Ask("cpus")
	status := func(want vmpod.State, reason string) {
		t.Helper()
		if st, err := m.Status(t.Context()); err != nil || st.State != want || st.Reason != reason {
			t.Errorf("status %+v, %v, want %v %q", st, err, want, reason)
		}
	}
	believed := func() {
		t.Helper()
		status(vmpod.StateRunning, "")
		for end := time.Now().Add(time.Minute); !m.evidentlyRuns(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("QEMU's main loop is never seen waiting, or its word does not count")
			}
		}
		status(vmpod.StateRunning, "")
	}
	believed()
	q, err := m.monitor(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := q.run(t.Context(), "stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		status(vmpod.StateUnknown, vmpod.ReasonVMPaused)
	}
	if err := q.run(t.Context(), "cont", nil, nil); err != nil {
		t.Fatal(err)
	}
	believed()
	m.mu.Lock()
	m.vouched = m.vouched.Add(-vouchFor)
	m.mu.Unlock()
	if m.evidentlyRuns() {
		t.Error("QEMU's word is good for ever")
	}
}

// vmdkDisk is an image of two extents, the second of which holds the content.
func vmdkDisk(t *testing.T) vmpod.Disk {
	t.Helper()
	dir := t.TempDir()
	extents := map[string]string{"meta.img": "first\n", "data.img": "second\n"}
	for name, content := range extents {
		b := make([]byte, 1<<20)
		copy(b, content)
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	descriptor := strings.Join([]string{
		"# Disk DescriptorFile", "version=1", "CID=fffffffe", "parentCID=ffffffff", `createType="monolithicFlat"`, "",
		"# Extent description",
		`RW 2048 FLAT "meta.img" 0`,
		`RDONLY 2048 FLAT "` + filepath.Join(dir, "data.img") + `" 0`, "",
		"# The Disk Data Base", "#DDB", `ddb.adapterType = "ide"`, `ddb.geometry.cylinders = "4"`, `ddb.geometry.heads = "16"`, `ddb.geometry.sectors = "63"`, "",
	}, "\n")
	path := filepath.Join(dir, "image.vmdk")
	if err := os.WriteFile(path, []byte(descriptor), 0o600); err != nil {
		t.Fatal(err)
	}
	return vmpod.Disk{ID: "img", Path: path, Format: "vmdk", ReadOnly: true}
}

// tapNIC makes a tap in a network namespace of this test's thread, or skips.
func tapNIC(t *testing.T) vmpod.NIC {
	t.Helper()
	return vmpod.NIC{ID: "eth0", Tap: testTap(t), MAC: net.HardwareAddr{2, 0, 0, 0xaa, 0xbb, 1}, MTU: 1400}
}

func testVMDKAndNIC(t *testing.T, k *vmpodtest.Talk, nic vmpod.NIC) {
	t.Helper()
	if got, want := k.Ask("disks"), "eph:131072:0 img:4096:1"; got != want {
		t.Errorf("guest has disks %q, want %q", got, want)
	}
	if got := k.Ask("read img"); got != "first" {
		t.Errorf("guest reads %q at the start of the vmdk", got)
	}
	if got := k.Ask("readat img 1048576"); got != "second" {
		t.Errorf("guest reads %q from the vmdk's second extent", got)
	}
	if got, want := k.Ask("nics"), fmt.Sprintf("%s:%d", nic.MAC, nic.MTU); got != want {
		t.Errorf("guest has NICs %q, want %q", got, want)
	}
}

// TestVMMOutOfMemory limits QEMU to little more than the guest's RAM.
func TestVMMOutOfMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a guest")
	}
	_, m := launchHere(t, func(c *Config) { c.Overhead = 1 << 20 }, smallSpec("oom-9f9f"))
	if len(m.proc.Cgroups) == 0 {
		t.Skip("cgroups cannot be written here")
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	e, err := m.Wait(ctx)
	if err != nil || e.Reason != vmpod.ExitVMMOOMKilled {
		t.Errorf("exit: %+v, %v, want %s", e, err, vmpod.ExitVMMOOMKilled)
	}
}

// TestPrivileges looks at what a QEMU of ours holds.
func TestPrivileges(t *testing.T) {
	_, m := launchHere(t, nil, smallSpec("priv-0001"))
	pid := strconv.Itoa(m.proc.PID)
	b, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		fmt.Sprintf("Uid:\t%d\t%[1]d\t%[1]d\t%[1]d\n", testUser), fmt.Sprintf("Gid:\t%d\t%[1]d\t%[1]d\t%[1]d\n", testUser),
		"Groups:\t \n", "CapEff:\t0000000000000000\n", "Seccomp:\t2\n",
	} {
		if !strings.Contains(string(b), want) {
			t.Errorf("/proc/PID/status lacks %q:\n%s", want, b)
		}
	}
	if sid, err := unix.Getsid(m.proc.PID); err != nil || sid != m.proc.PID {
		t.Errorf("QEMU is in session %d, %v: want its own", sid, err)
	}
	fds, err := os.ReadDir("/proc/" + pid + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		target, _ := os.Readlink("/proc/" + pid + "/fd/" + fd.Name())
		switch {
		case target == "/dev/null" || strings.HasPrefix(target, "anon_inode:"), strings.HasPrefix(target, "socket:"),
			strings.HasPrefix(target, string(m.dir)), strings.HasPrefix(target, "/memfd:"),
			target == m.d.cfg.Guest.Kernel, target == m.d.cfg.Guest.Initrd, target == "/dev/urandom":
		default:
			t.Errorf("QEMU holds descriptor %s: %s", fd.Name(), target)
		}
	}
}

// TestVMsAreStrangers holds that no QEMU can reach another, nor the network.
func TestVMsAreStrangers(t *testing.T) {
	cfg := testConfig(t)
	cfg.UIDs = 1000
	d := newDriver(t, cfg)
	defer func() { d.Close() }()
	uids := map[uint32]bool{}
	here, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"stranger-1", "stranger-2"} {
		launched, err := d.Launch(t.Context(), smallSpec(name))
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if m, err := d.Open(context.Background(), launched.Spec().ID); err == nil {
				_ = m.Remove(context.Background())
			}
		}()
		m := launched.(*Machine)
		dir := fmt.Sprintf("/proc/%d", m.proc.PID)
		b, err := os.ReadFile(dir + "/status")
		if err != nil || !strings.Contains(string(b), fmt.Sprintf("Uid:\t%d\t%[1]d\t%[1]d\t%[1]d\nGid:\t%[1]d\t%[1]d\t%[1]d\t%[1]d\n", m.proc.UID)) {
			t.Errorf("%v\n%s", err, b)
		}
		if uids[m.proc.UID] || m.proc.UID < testUser || m.proc.UID >= testUser+1000 {
			t.Errorf("user %d, others have %v", m.proc.UID, uids)
		}
		uids[m.proc.UID] = true
		if net, err := os.Readlink(dir + "/ns/net"); err != nil || net == here && d.nowhere.err == nil {
			t.Errorf("QEMU is in our network namespace %s, %v", net, err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = newDriver(t, cfg)
	if _, err := d.List(t.Context()); err != nil || len(d.users.byVM) != 2 {
		t.Errorf("after a restart the driver knows the users of %d VMs, %v", len(d.users.byVM), err)
	}
}

// TestUnfinishedLaunch: a driver died between starting QEMU and writing down
// its pid, or before it started the CPUs.
func TestUnfinishedLaunch(t *testing.T) {
	d, m := launchHere(t, nil, smallSpec("half-7c7c"))
	pidfd, err := m.proc.open()
	if err != nil {
		t.Fatal(err)
	}
	defer pidfd.Close()
	cfg := d.cfg
	d.Close()
	if err := os.Remove(m.dir.file(processFile)); err != nil {
		t.Fatal(err)
	}
	d = newDriver(t, cfg)
	defer d.Close()
	if _, err := d.Open(context.Background(), m.id); !errdefs.IsNotFound(err) {
		t.Errorf("Open of an unfinished launch: %v, want NotFound", err)
	}
	done := make(chan error, 1)
	go func() { done <- waitPidfd(pidfd) }()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Error("the QEMU of an unfinished launch still runs")
	}
	if left := leftovers(t, cfg); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// TestRawCommand boots the printed command line as a person would.
func TestRawCommand(t *testing.T) {
	cfg := testConfig(t)
	d := newDriver(t, cfg)
	defer d.Close()
	s := smallSpec("raw-1")
	s.Disks = []vmpod.Disk{makeDisk(t, "eph", "raw", 1<<20)}
	argv, err := d.RawCommand(s, cfg.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(argv[0], append(argv[1:], "-S")...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		q, err := dialQMP(ctx, filepath.Join(cfg.RunDir, qmpSocket), nil)
		if err == nil {
			q.close()
			return
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
