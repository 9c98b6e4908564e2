package vcsim

import (
	"testing"
	"time"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/types"
)

// TestReconfigureDisks plugs and unplugs as a change of a VM's devices: all of
// a change, or nothing of it.
func TestReconfigureDisks(t *testing.T) {
	s := start(t, diskConfig(""))
	vm := must[string](t)(s.Mirror(t.Context(), Mirror{UUID: podUUID, Name: "web", CPUs: 1, MemoryMiB: 256, Host: "node-1"}))
	c := signIn(t, s, admin)
	machine := object.NewVirtualMachine(c.Client, types.ManagedObjectReference{Type: "VirtualMachine", Value: vm})
	reconfigure := func(changes ...types.BaseVirtualDeviceConfigSpec) error {
		t.Helper()
		task, err := machine.Reconfigure(t.Context(), types.VirtualMachineConfigSpec{DeviceChange: changes})
		if err != nil {
			return err
		}
		return task.Wait(t.Context())
	}
	change := func(op types.VirtualDeviceConfigSpecOperation, id string) types.BaseVirtualDeviceConfigSpec {
		return &types.VirtualDeviceConfigSpec{Operation: op, Device: &types.VirtualDisk{VDiskId: &types.ID{Id: id}}}
	}
	const add, remove = types.VirtualDeviceConfigSpecOperationAdd, types.VirtualDeviceConfigSpecOperationRemove
	one := mustGovc(t, s, "disk.create", "-ds", "fast", "-size", "1G", "one")
	two := mustGovc(t, s, "disk.create", "-ds", "slow", "-size", "1G", "two")
	if err := reconfigure(change(add, one), change(add, "never-was")); !fault.Is(err, &types.NotFound{}) || len(disksOf(t, s, vm)) != 0 {
		t.Errorf("a change that cannot be: %v, and %d disks", err, len(disksOf(t, s, vm)))
	}
	if err := reconfigure(change(add, one), change(add, two)); err != nil || len(disksOf(t, s, vm)) != 2 {
		t.Fatalf("two disks: %v, and %d", err, len(disksOf(t, s, vm)))
	}
	if err := reconfigure(change(add, one)); !fault.Is(err, &types.ResourceInUse{}) {
		t.Errorf("a disk that it has: %v", err)
	}
	// By its key, as clients remove what they read.
	have := disksOf(t, s, vm)[0]
	have.VDiskId = nil
	if err := reconfigure(&types.VirtualDeviceConfigSpec{Operation: remove, Device: have}); err != nil || len(disksOf(t, s, vm)) != 1 {
		t.Errorf("removal by key: %v, and %d disks", err, len(disksOf(t, s, vm)))
	}
	destroy := &types.VirtualDeviceConfigSpec{Operation: remove, FileOperation: types.VirtualDeviceConfigSpecFileOperationDestroy, Device: disksOf(t, s, vm)[0]}
	if err := reconfigure(destroy); !fault.Is(err, &types.NotSupported{}) {
		t.Errorf("removal with the file: %v", err)
	}
	task, err := machine.Reconfigure(t.Context(), types.VirtualMachineConfigSpec{NumCPUs: 4})
	if err == nil {
		err = task.Wait(t.Context())
	}
	if !fault.Is(err, &types.NotSupported{}) {
		t.Errorf("another change of a pod's VM: %v", err)
	}
}

// TestHeldTask: a fault rule decides when a disk's task does its work.
func TestHeldTask(t *testing.T) {
	s := start(t, diskConfig(""))
	hold := make(chan struct{})
	s.Faults().Add(Fault{Method: "VslmCreateDisk_Task", Times: 1, Hold: hold})
	made := make(chan string, 1)
	go func() {
		id, err := govc(t, s, "disk.create", "-ds", "fast", "-size", "1G", "slow")
		if err != nil {
			t.Error(err)
		}
		made <- id
	}()
	for s.Faults().Calls()["VslmQueryInfo"] < 2 { // it is polled
		time.Sleep(time.Millisecond)
	}
	if out := mustGovc(t, s, "disk.ls"); out != "" {
		t.Errorf("made before its time: %s", out)
	}
	close(hold)
	if id := <-made; mustGovc(t, s, "disk.ls", id) == "" {
		t.Error("the disk was never made")
	}
	s.Faults().Add(Fault{Method: "VslmCreateDisk_Task", Times: 1, Task: true, Late: true, Fault: &types.Timedout{}})
	if _, err := govc(t, s, "disk.create", "-ds", "fast", "-size", "1G", "late"); err == nil {
		t.Error("a task that fails did not")
	}
	if out := mustGovc(t, s, "disk.ls", "-q", "name.eq=late"); out == "" {
		t.Error("what was done late was not done")
	}
}
