package podinit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// TestSharedPod is a pod with one PID namespace, without a disk of its own,
// whose images are plugged while it runs, and which then is left alone.
func TestSharedPod(t *testing.T) {
	vm := bootVM(t)
	c := vm.attach()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	g := guestOps{c, t, ctx}

	r := setupRequest()
	r.Entropy = nil
	if _, err := c.SetupSandbox(ctx, r); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("without entropy: %v", err)
	}
	r = setupRequest()
	r.SharePid, r.EphemeralDisk = true, ""
	for range 2 {
		if _, err := c.SetupSandbox(ctx, r); err != nil {
			t.Fatal(err)
		}
	}
	g.create("a", ociSpec("sleep", "1234"), nil)
	g.start("a")
	if out, _ := g.run("b", ociSpec("ps", "-o", "pid,args"), nil); !strings.Contains(out, "sleep 1234") || !strings.Contains(out, pauseName) {
		t.Errorf("a container of the same pod sees\n%s", out)
	}
	testStuckHost(vm, g)
	testPluggedImage(vm, g)
	testTargetPID(g)
	g.Client = testIdle(vm, g)
	g.remove("a")
	// A cgroup of the machine itself shows what is left of the containers.
	root := ociSpec("ls", "/sys/fs/cgroup/atoll")
	root.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.PIDNamespace}}
	if out, _ := g.run("look", root, nil); !strings.Contains(out, "look") || strings.Contains(out, "\na\n") || strings.Contains(out, "\nb\n") {
		t.Errorf("cgroups left: %q", out)
	}
}

// testStuckHost has a container fill the channel while the host reads
// nothing, and then another host.
func testStuckHost(vm *testVM, g guestOps) {
	g.create("chatty", ociSpec("sh", "-c", "yes 0123456789abcdefghijklmnopqrstuvwxyz | head -c 8000000"), nil)
	out, err := g.Stdout(g.ctx, "chatty", "")
	if err != nil {
		g.t.Fatal(err)
	}
	defer out.Close()
	g.start("chatty")
	exit := g.wait("chatty", "") // cut off after attachPatience, not stuck
	n, at := 0, time.Now()
	for rec, err := range g.Logs(g.ctx, "chatty", 0) {
		if err != nil {
			g.t.Fatal(err)
		}
		n += len(rec.Line)
		if !rec.Eof && !rec.Partial {
			n++
		}
	}
	g.t.Logf("%d bytes of log in lines of 37 in %v", n, time.Since(at).Round(time.Millisecond))
	if exit.ExitCode != 0 || n < 8000000 || n > 8000001 {
		g.t.Errorf("exit %v, %d bytes of log", exit, n)
	}
	if _, err := io.ReadAll(out); err == nil {
		g.t.Error("an attach that took nothing was not cut off")
	}
	g.remove("chatty")
}

// testPluggedImage creates a container before its image's disk is there.
func testPluggedImage(vm *testVM, g guestOps) {
	vm.command("drive_add 0 if=none,id=late,format=raw,read-only=on,file.locking=off,file=" + vm.image)
	go func() {
		time.Sleep(300 * time.Millisecond)
		vm.command("device_add virtio-blk-pci,drive=late,serial=late-1,bus=rp0,id=latedev")
	}()
	at := time.Now()
	out, _ := g.run("late", ociSpec("echo", "plugged"), func(r *agentapi.CreateContainerRequest) { r.ImageDisk = "late-1" })
	if out != "plugged\n" {
		g.t.Errorf("got %q", out)
	}
	g.t.Logf("plugged 300 ms after it was wanted, ran after %v", time.Since(at).Round(time.Millisecond))
	b := mustJSON(g.t, ociSpec("true"))
	_, err := g.CreateContainer(g.ctx, &agentapi.CreateContainerRequest{Id: "never", Spec: b, ImageDisk: "never"})
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "disk never") {
		g.t.Errorf("a disk that never comes: %v", err)
	}
}

func testTargetPID(g guestOps) {
	s := ociSpec("ps", "-o", "pid,args")
	s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.PIDNamespace, Path: "container:a"}}
	if out, _ := g.run("debug", s, nil); !strings.Contains(out, "sleep 1234") {
		g.t.Errorf("the target's processes: %s", out)
	}
	s.Linux.Namespaces[0].Path = "container:nobody"
	_, err := g.CreateContainer(g.ctx, &agentapi.CreateContainerRequest{Id: "debug2", Spec: mustJSON(g.t, s), ImageDisk: "img"})
	if !errdefs.IsNotFound(err) {
		g.t.Errorf("no target: %v", err)
	}
}

// testIdle: a pod that does nothing costs nothing, with a host and without.
func testIdle(vm *testVM, g guestOps) *agentapi.Client {
	const watch = 3 * time.Second
	for _, host := range []string{"attached", "away", "back"} {
		switch host {
		case "away":
			g.Client.Close()
		case "back":
			g.Client = vm.attach()
		}
		time.Sleep(time.Second)
		before := vm.cpuTime()
		time.Sleep(watch)
		used := vm.cpuTime() - before
		g.t.Logf("host %s: %.2f %% of a core", host, 100*used.Seconds()/watch.Seconds())
		if used > watch/20 {
			g.t.Errorf("an idle VM used %v of %v with the host %s", used, watch, host)
		}
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", vm.pid))
	if err == nil {
		for _, line := range strings.Split(string(b), "\n") {
			if strings.HasPrefix(line, "Pss:") {
				g.t.Log("QEMU's memory: ", line)
			}
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		g.t.Log(err)
	}
	return g.Client
}
