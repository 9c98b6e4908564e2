package vmpodtest

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/openatoll/atoll/vmpod"
)

// guestInit is PID 1 of the suite's guest: it answers commands, one line
// each, on the agent port. See Talk.
//
//go:embed guest.sh
var guestInit []byte

// guestModules are what the stock kernel lacks for that, in any order.
var guestModules = []string{
	"virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng",
	"pvpanic-pci", "button", "evdev", "virtio_mem",
}

// demandModules are loaded by the command share.
var demandModules = []string{"virtiofs"}

// A Guest is a kernel and an initramfs that speaks the suite's protocol.
type Guest struct{ Kernel, Initrd string }

// BuildGuest makes the suite's guest of the distribution's kernel and
// busybox, in a second at most. It skips the test if they are not installed.
func BuildGuest(t testing.TB) Guest {
	t.Helper()
	kernels, _ := filepath.Glob("/boot/vmlinuz-*-cloud-amd64")
	sort.Strings(kernels)
	busybox, err := os.ReadFile("/bin/busybox")
	if len(kernels) == 0 || err != nil {
		t.Skip("needs the packages linux-image-cloud-amd64 and busybox-static (make deps)")
	}
	g := Guest{Kernel: kernels[len(kernels)-1], Initrd: filepath.Join(t.TempDir(), "initramfs")}
	release := strings.TrimPrefix(filepath.Base(g.Kernel), "vmlinuz-")
	var a archive
	for _, dir := range []string{"bin", "dev", "proc", "sys", "modules", "demand"} {
		a.add(dir, 0o040755, nil)
	}
	a.add("init", 0o100755, guestInit)
	a.add("bin/busybox", 0o100755, busybox)
	// In one order: templates are told by the content of their guest.
	for _, of := range []struct {
		into  string
		names []string
	}{{"modules", guestModules}, {"demand", demandModules}} {
		for i, path := range modulePaths(t, filepath.Join("/lib/modules", release), of.names) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			a.add(fmt.Sprintf("%s/%02d-%s", of.into, i, filepath.Base(path)), 0o100644, b)
		}
	}
	a.add("TRAILER!!!", 0, nil)
	if err := os.WriteFile(g.Initrd, a.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return g
}

// modulePaths returns the files of modules and of what they need, each after
// its needs.
func modulePaths(t testing.TB, dir string, names []string) []string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		t.Fatal(err)
	}
	needs, byName := map[string][]string{}, map[string]string{}
	for line := range strings.Lines(string(b)) {
		file, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		needs[file] = strings.Fields(rest)
		byName[strings.ReplaceAll(strings.TrimSuffix(filepath.Base(file), ".ko"), "-", "_")] = file
	}
	var out []string
	seen := map[string]bool{}
	var visit func(file string)
	visit = func(file string) {
		if seen[file] {
			return
		}
		seen[file] = true
		for _, n := range needs[file] {
			visit(n)
		}
		out = append(out, filepath.Join(dir, file))
	}
	for _, m := range names {
		file, ok := byName[strings.ReplaceAll(m, "-", "_")]
		if !ok {
			t.Fatalf("kernel in %s has no module %s", dir, m)
		}
		visit(file)
	}
	return out
}

// archive is a cpio archive in the newc format.
type archive struct{ bytes.Buffer }

func (a *archive) add(name string, mode uint32, data []byte) {
	fmt.Fprintf(a, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
	a.pad()
	a.Write(data)
	a.pad()
}

func (a *archive) pad() {
	for a.Len()%4 != 0 {
		a.WriteByte(0)
	}
}

// A Talk is a conversation with the suite's guest.
type Talk struct {
	t    testing.TB
	conn net.Conn
	r    *bufio.Reader
}

// bootPatience bounds a boot: a few seconds under emulation, many times that
// when other tests use the same CPUs.
const bootPatience = 2 * time.Minute

// Dial opens the agent channel and waits until the guest answers on it.
func Dial(t testing.TB, m vmpod.Machine) *Talk {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), bootPatience)
	defer cancel()
	c, err := m.Dial(ctx)
	if err != nil {
		t.Fatalf("Dial: %v", err)
	}
	k := &Talk{t: t, conn: c, r: bufio.NewReader(c)}
	t.Cleanup(k.Close)
	// What an earlier connection left half said ends here.
	marker := fmt.Sprintf("hello-%d", time.Now().UnixNano())
	k.send("\n" + marker)
	c.SetReadDeadline(time.Now().Add(bootPatience))
	for {
		line, err := k.r.ReadString('\n')
		if err != nil {
			t.Fatalf("guest does not answer: %v", err)
		}
		if strings.Contains(line, marker) {
			return k
		}
	}
}

// Close ends the conversation.
func (k *Talk) Close() { k.conn.Close() }

func (k *Talk) send(line string) {
	k.t.Helper()
	if _, err := k.conn.Write([]byte(line + "\n")); err != nil {
		k.t.Fatalf("write to the guest: %v", err)
	}
}

// Tell sends a command whose effect keeps the guest from answering:
// "poweroff", "reboot", "panic".
func (k *Talk) Tell(command string) {
	k.t.Helper()
	k.send(command)
}

// Ask sends a command and returns the answer, less the newline:
//
//	boot             the guest's boot id
//	cpus             how many there are
//	memory           MemTotal in KiB
//	disks            "serial:sectors:ro" of each disk, in the guest's order
//	nics             "mac:mtu" of each interface, in the guest's order
//	read SERIAL      the first line on the disk
//	readat SERIAL N  the line that begins at byte N of the disk
//	write SERIAL N   writes N MiB to the disk and syncs: "ok" or "failed"
//	mark SERIAL WORD writes the first line of the disk and syncs: "ok" or "failed"
//	stamp SERIAL N   writes N into the N-th 4 KiB of the disk, then into the first,
//	                 syncing each: "ok" or "failed"
//	pour SERIAL N    writes N MiB that are not zeroes and syncs: the seconds since
//	                 the boot before and after, "failed" for the first
//	online           uses the CPUs and memory that were plugged: "ok"
//	fill N           writes N MiB of memory: "ok" or "failed"
//	share TAG        mounts a share at /share/TAG: "ok" or "failed"
//	first PATH       the first line of a file, or "failed"
//	put PATH WORD    writes a file of one word: "ok" or "failed"
//	list PATH        the names in a directory, sorted, in one line
//	device PATH      makes a device node: "ok" or "failed"
//	deaf             from now on the power button is ignored: "ok"
func (k *Talk) Ask(command string) string {
	k.t.Helper()
	k.send(command)
	k.conn.SetReadDeadline(time.Now().Add(30 * time.Second))
	line, err := k.r.ReadString('\n')
	if err != nil {
		k.t.Fatalf("guest does not answer %q: %v", command, err)
	}
	return strings.TrimSpace(line)
}

// AskUntil repeats a command until the answer satisfies ok.
func (k *Talk) AskUntil(command string, ok func(string) bool) string {
	k.t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		answer := k.Ask(command)
		if ok(answer) {
			return answer
		}
		if time.Now().After(end) {
			k.t.Fatalf("guest still answers %q with %q", command, answer)
		}
	}
}
