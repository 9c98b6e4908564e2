package podinit

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// TestOnline plugs memory and a CPU: containers, also such as run already, may
// use both once Online has returned.
func TestOnline(t *testing.T) {
	vm := bootVM(t, "-m", "256M,maxmem=4G", "-smp", "1,maxcpus=2")
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	g := guestOps{vm.attach(), t, ctx}
	if _, err := g.SetupSandbox(ctx, setupRequest()); err != nil {
		t.Fatal(err)
	}
	const boot = 256 << 20
	online := func(cpus int32, memory int64) *agentapi.OnlineResponse {
		t.Helper()
		r, err := g.Online(ctx, &agentapi.OnlineRequest{Cpus: cpus, Memory: memory})
		if err != nil {
			t.Fatalf("Online(%d, %d MiB): %v", cpus, memory>>20, err)
		}
		return r
	}
	before := online(1, boot)
	if before.Cpus != 1 || before.Memory > boot || before.Memory < boot/2 {
		t.Fatalf("before: %v", before)
	}
	g.create("old", ociSpec("sh", "-c", "dd if=/dev/zero of=/dev/shm/x bs=1M count=40 && echo filled && sleep 1000"), nil)
	g.start("old")

	vm.command("object_add memory-backend-ram,id=more,size=2G,reserve=off")
	vm.command("device_add virtio-mem-pci,id=vmem,memdev=more,bus=rp0,requested-size=1536M")
	vm.command("device_add max-x86_64-cpu,id=second,socket-id=0,core-id=1,thread-id=0")
	begin := time.Now()
	after := online(2, boot+1536<<20)
	t.Logf("1536 MiB and a CPU took %v", time.Since(begin))
	if by := after.Memory - before.Memory; after.Cpus != 2 || by < 1536<<20-onlineSlack || by > 1536<<20 {
		t.Errorf("after: %v, before: %v", after, before)
	}
	if again := online(1, boot); again.Cpus != 2 || again.Memory != after.Memory {
		t.Errorf("less than there is: %v, want %v", again, after)
	}
	if out, _, code := g.exec("old", "cpus", "busybox", "nproc"); code != 0 || strings.TrimSpace(out) != "2" {
		t.Errorf("nproc in a container that ran before: %q, %d", out, code)
	}
	// More than the machine had, in one process.
	if out, exit := g.run("new", ociSpec("dd", "if=/dev/zero", "of=/dev/null", "bs=600M", "count=1"), nil); exit.ExitCode != 0 {
		t.Errorf("600 MiB cannot be used: %v, %s", exit, out)
	}

	shrink := func(mib int64) error {
		limit := mib << 20
		_, err := g.UpdateContainer(ctx, &agentapi.UpdateContainerRequest{Id: "old", Resources: mustJSON(t, &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}})})
		return err
	}
	if err := shrink(16); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "would kill it") {
		t.Errorf("a limit below what is used: %v", err)
	}
	if err := shrink(64); err != nil {
		t.Errorf("a limit above what is used: %v", err)
	}
	short, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if r, err := g.Online(short, &agentapi.OnlineRequest{Cpus: 3, Memory: boot}); err == nil {
		t.Errorf("a CPU that never comes: %v", r)
	}
}
