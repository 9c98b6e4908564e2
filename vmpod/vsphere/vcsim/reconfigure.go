package vcsim

import (
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
	"github.com/vmware/govmomi/vslm"
	vslmmethods "github.com/vmware/govmomi/vslm/methods"
	vslmtypes "github.com/vmware/govmomi/vslm/types"
)

// reconfigNeeds is what the changes of devices need; what else a spec changes
// is refused.
func reconfigNeeds(c *call) []demand {
	changes, ok := diskChanges(c.body.(*types.ReconfigVM_Task).Spec)
	if !ok {
		return []demand{{"VirtualMachine.Config.Settings", c.this}}
	}
	var demands []demand
	for _, ch := range changes {
		if ch.Operation == types.VirtualDeviceConfigSpecOperationAdd {
			demands = append(demands, demand{"VirtualMachine.Config.AddExistingDisk", c.this})
		} else {
			demands = append(demands, demand{"VirtualMachine.Config.RemoveDisk", c.this})
		}
	}
	return demands
}

// diskChanges are a spec's, if it plugs and unplugs First Class Disks alone.
func diskChanges(spec types.VirtualMachineConfigSpec) ([]*types.VirtualDeviceConfigSpec, bool) {
	var changes []*types.VirtualDeviceConfigSpec
	for _, change := range spec.DeviceChange {
		ch := change.GetVirtualDeviceConfigSpec()
		if _, disk := ch.Device.(*types.VirtualDisk); !disk || ch.FileOperation != "" || ch.Operation == types.VirtualDeviceConfigSpecOperationEdit {
			return nil, false
		}
		changes = append(changes, ch)
	}
	spec.DeviceChange = nil
	rest := spec.Name + spec.Annotation + spec.GuestId + spec.InstanceUuid + spec.Uuid
	return changes, len(changes) > 0 && rest == "" && spec.NumCPUs == 0 && spec.MemoryMB == 0 && len(spec.ExtraConfig) == 0
}

// reconfigure plugs and unplugs disks: all, or none of them.
func (c *call) reconfigure() soap.HasFault {
	changes, ok := diskChanges(c.body.(*types.ReconfigVM_Task).Spec)
	if !ok {
		return c.refuseVM()
	}
	return c.work(func() (types.AnyType, types.BaseMethodFault) {
		var undo []func() types.BaseMethodFault
		for _, ch := range changes {
			id, mode := c.s.changedDisk(ch.Device.(*types.VirtualDisk), c.this)
			var fault types.BaseMethodFault
			if ch.Operation == types.VirtualDeviceConfigSpecOperationAdd {
				_, fault = c.s.attachDisk(id, c.this, mode)
				undo = append(undo, func() types.BaseMethodFault { return c.s.detachDisk(id, c.this) })
			} else {
				fault = c.s.detachDisk(id, c.this)
				undo = append(undo, func() types.BaseMethodFault { _, f := c.s.attachDisk(id, c.this, mode); return f })
			}
			if fault == nil {
				continue
			}
			for i := len(undo) - 2; i >= 0; i-- {
				if f := undo[i](); f != nil {
					c.s.log.Error("a change of devices could not be taken back", "vm", c.this.Value, "fault", messageOf(f))
				}
			}
			return nil, fault
		}
		return nil, nil
	})
}

// changedDisk finds the First Class Disk that a device is, by its id, file or,
// in the VM, key.
func (s *Server) changedDisk(device *types.VirtualDisk, vm types.ManagedObjectReference) (id, mode string) {
	file := ""
	if b, ok := device.Backing.(*types.VirtualDiskFlatVer2BackingInfo); ok {
		file, mode = b.FileName, b.DiskMode
	}
	if device.VDiskId != nil {
		return device.VDiskId.Id, mode
	}
	for _, d := range s.disks {
		if d.path() == file || d.At != nil && d.At.VM == vm.Value && d.At.Key == device.Key {
			return d.ID, mode
		}
	}
	return file, mode
}

var vslmContent = vslmtypes.VslmServiceInstanceContent{
	AboutInfo:               vslmtypes.VslmAboutInfo{Name: "VSLM", FullName: "VSLM 1.0.0", Vendor: "Atoll", ApiVersion: "1.0.0", InstanceUuid: "31c68687-4f1e-4247-8158-f31d1ce95bbe"},
	SessionManager:          types.ManagedObjectReference{Type: "VslmSessionManager", Value: "SessionManager"},
	VStorageObjectManager:   types.ManagedObjectReference{Type: "VslmVStorageObjectManager", Value: "VStorageObjectManager"},
	StorageLifecycleManager: types.ManagedObjectReference{Type: "VslmStorageLifecycleManager", Value: "StorageLifecycleManager"},
}

// buildDisks serves the other two ways to disks.
func (s *Server) buildDisks() {
	v := simulator.NewRegistry()
	v.Namespace, v.Path, v.Cookie, v.Handler = vslm.Namespace, vslm.Path, simulator.SOAPCookie, s.handle
	s.svc.RegisterSDK(v)
	s.buildCNS()
}

func (c *call) vslmContent() soap.HasFault {
	return &vslmmethods.RetrieveContentBody{Res: &vslmtypes.RetrieveContentResponse{Returnval: vslmContent}}
}

// vslmTask finds the task behind one of VSLM's, which have the same id.
func (c *call) vslmTask() (info types.TaskInfo, fault types.BaseMethodFault) {
	t, ok := c.s.vim.Get(types.ManagedObjectReference{Type: "Task", Value: c.this.Value}).(*simulator.Task)
	if !ok {
		return info, &types.ManagedObjectNotFound{Obj: c.this}
	}
	c.s.locked(t, func() { info = t.Info })
	return info, nil
}

func (c *call) vslmTaskInfo() soap.HasFault {
	t, fault := c.vslmTask()
	if fault != nil {
		return refuse(fault)
	}
	return &vslmmethods.VslmQueryInfoBody{Res: &vslmtypes.VslmQueryInfoResponse{Returnval: vslmtypes.VslmTaskInfo{
		Key: c.this.Value, Task: c.this, Name: t.Name, DescriptionId: t.DescriptionId, State: vslmtypes.VslmTaskInfoState(t.State),
		Error: t.Error, Result: t.Result, QueueTime: t.QueueTime, StartTime: t.StartTime, CompleteTime: t.CompleteTime,
		Cancelable: false, Cancelled: false, Reason: &vslmtypes.VslmTaskReasonUser{UserName: c.s.principal(c.who.Name)},
	}}}
}

func (c *call) vslmTaskResult() soap.HasFault {
	t, fault := c.vslmTask()
	if fault != nil {
		return refuse(fault)
	}
	return &vslmmethods.VslmQueryTaskResultBody{Res: &vslmtypes.VslmQueryTaskResultResponse{Returnval: t.Result}}
}
