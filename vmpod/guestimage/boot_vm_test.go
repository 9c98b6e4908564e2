package guestimage

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// boot runs the guest under emulation and returns its console and the time
// from QEMU's start to its end.
func boot(t *testing.T, g Guest) (console string, took time.Duration) {
	t.Helper()
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is not installed (apt-get install qemu-system-x86)")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35,accel=tcg,sata=off,smbus=off", "-cpu", "max", "-m", "128",
		"-kernel", g.Kernel, "-initrd", g.Initrd, "-append", "console=ttyS0 panic=-1 quiet no_timer_check "+g.Cmdline,
		"-serial", "stdio", "-device", "virtio-serial-pci")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	start := time.Now()
	err = cmd.Run()
	took = time.Since(start)
	console = strings.ReplaceAll(out.String(), "\r", "")
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, console)
	}
	return console, took
}

func buildHello(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "hello")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags=-s -w", "-o", file, "./testdata/hello")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	return file
}

// TestBoot boots every flavour that this machine has.
func TestBoot(t *testing.T) {
	if testing.Short() {
		t.Skip("boots VMs")
	}
	hello := buildHello(t)
	tuned, err := filepath.Abs("../../build/guest-kernel")
	if err != nil {
		t.Fatal(err)
	}
	for _, flavour := range []string{FlavourStock, FlavourTuned} {
		t.Run(flavour, func(t *testing.T) {
			g, err := Build(t.Context(), Options{Out: t.TempDir(), Kernel: flavour, Podinit: hello, TunedDir: tuned})
			if flavour == FlavourTuned && err != nil {
				t.Skipf("no tuned kernel: %v", err)
			}
			if err != nil {
				t.Fatal(err)
			}
			console, took := boot(t, g)
			t.Logf("QEMU's start to its end: %v", took.Round(time.Millisecond))
			for _, want := range []string{
				"HELLO " + g.KernelRelease, "CRUN \"crun version", "FS erofs true", "FS overlay true", "FS ext4 true", "FS cgroup2 true", "CONTAINER pid 1 host box",
			} {
				if !strings.Contains(console, want) {
					t.Errorf("no %q on the console", want)
				}
			}
			if strings.Contains(console, "\nMODULE ") {
				t.Error("a module could not be loaded")
			}
			if t.Failed() {
				t.Log(console)
			}
		})
	}
}
