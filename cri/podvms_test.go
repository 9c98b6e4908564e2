package cri

import (
	"testing"

	"github.com/openatoll/atoll/vmpod"
)

// TestPodVMsAreTold: a VM is told of when its sandbox is ready, when it has
// grown, and by the next server, which has not made it.
func TestPodVMsAreTold(t *testing.T) {
	host, dir := newFakeHost(), t.TempDir()
	s := serve(t, host, dir)
	told := make(chan vmpod.PodVM, 16)
	s.PodVMs(func(vm vmpod.PodVM) { told <- vm })
	sandbox := s.run(t)
	is := func(cpus int) {
		t.Helper()
		got := <-told
		sb, ok := s.store.sandbox(sandbox)
		if !ok {
			t.Fatal("no sandbox")
		}
		if got.ID != sb.VM || got.Owner != (vmpod.Owner{PodUID: podUID, Namespace: "default", Name: "web"}) || got.MAC.String() != sb.Attachment.MAC.String() || got.MAC == nil || got.CPUs != cpus || got.Memory != sb.Memory {
			t.Errorf("told of %+v, want that of %+v with %d CPUs", got, sb, cpus)
		}
	}
	sb, _ := s.store.sandbox(sandbox)
	is(sb.CPUs)
	p := s.livePod(sandbox)
	if err := p.recordSize(vmpod.Extent{CPUs: sb.CPUs + 1, Memory: sb.Memory}, sb.Hint); err != nil {
		t.Fatal(err)
	}
	is(sb.CPUs + 1)
	s.stop()

	s = serve(t, host, dir)
	s.PodVMs(func(vm vmpod.PodVM) { told <- vm })
	is(sb.CPUs + 1)
}

func TestDiskUUIDIsTheVMs(t *testing.T) {
	a, b := vmpod.ID{PodUID: podUID}, vmpod.ID{PodUID: podUID, Attempt: 1}
	if a.DiskUUID() != a.DiskUUID() || a.DiskUUID() == a.UUID() || a.DiskUUID() == b.DiskUUID() {
		t.Errorf("disks %s and %s of VMs %s and %s", a.DiskUUID(), b.DiskUUID(), a.UUID(), b.UUID())
	}
}
