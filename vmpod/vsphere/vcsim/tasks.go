package vcsim

import (
	"reflect"
	"strings"
	"time"

	"github.com/google/uuid"
	cnsmethods "github.com/vmware/govmomi/cns/methods"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
	vslmmethods "github.com/vmware/govmomi/vslm/methods"
)

// maxTasks are kept; older ones are forgotten, as a vCenter forgets them after
// ten minutes.
const maxTasks = 2000

// task returns the response of a _Task method whose work is done already: the
// task has ended, with result or fault. A stuck one runs for ever.
func (c *call) task(result types.AnyType, fault types.BaseMethodFault, stuck bool) soap.HasFault {
	return taskBody(c.name, c.s.putTask(c, result, fault, stuck))
}

// work returns the response of a _Task method and does its work, with s.mu
// held: before the answer, or, where a fault rule holds it, later.
func (c *call) work(do func() (types.AnyType, types.BaseMethodFault)) soap.HasFault {
	e := exchangeOf(c.request)
	run := func() (types.AnyType, types.BaseMethodFault) {
		c.s.mu.Lock()
		defer c.s.mu.Unlock()
		result, fault := do()
		if fault == nil && e.fail != nil {
			return nil, e.fail
		}
		return result, fault
	}
	if e.hold == nil {
		result, fault := run()
		return c.task(result, fault, false)
	}
	ref := c.s.putTask(c, nil, nil, true)
	go func() {
		select {
		case <-e.hold:
			result, fault := run()
			c.s.endTask(ref, result, fault)
		case <-c.s.stopping: // it dies with the process
		}
	}()
	return taskBody(c.name, ref)
}

// endTask ends a task that ran.
func (s *Server) endTask(ref types.ManagedObjectReference, result types.AnyType, fault types.BaseMethodFault) {
	t, ok := s.vim.Get(ref).(*simulator.Task)
	if !ok {
		return
	}
	now := time.Now()
	changes := []types.PropertyChange{set("info.completeTime", &now), set("info.state", types.TaskInfoStateSuccess)}
	if fault != nil {
		changes[1].Val = types.TaskInfoStateError
		changes = append(changes, set("info.error", localized(fault)))
	} else if result != nil {
		changes = append(changes, set("info.result", result))
	}
	s.update(t, changes...)
}

// putTask records a task of the call.
func (s *Server) putTask(c *call, result types.AnyType, fault types.BaseMethodFault, stuck bool) types.ManagedObjectReference {
	now := time.Now()
	t := &simulator.Task{}
	t.Self = types.ManagedObjectReference{Type: "Task", Value: "task-" + uuid.NewString()}
	on := c.this
	t.Info = types.TaskInfo{
		Key: t.Self.Value, Task: t.Self, Name: c.name, DescriptionId: c.this.Type + "." + c.name,
		Entity: &on, EntityName: s.nameOf(c.this),
		State: types.TaskInfoStateRunning, QueueTime: now, StartTime: &now,
		Reason: &types.TaskReasonUser{UserName: s.principal(c.who.Name)},
	}
	switch {
	case stuck:
	case fault != nil:
		t.Info.State, t.Info.CompleteTime = types.TaskInfoStateError, &now
		t.Info.Error = &types.LocalizedMethodFault{Fault: fault, LocalizedMessage: messageOf(fault)}
	default:
		t.Info.State, t.Info.CompleteTime, t.Info.Result = types.TaskInfoStateSuccess, &now, result
	}
	s.vim.Put(t)
	s.hub.mu.Lock()
	s.hub.tasks = append(s.hub.tasks, t.Self)
	var old []types.ManagedObjectReference
	if n := len(s.hub.tasks) - maxTasks; n > 0 {
		old = s.hub.tasks[:n:n]
		s.hub.tasks = s.hub.tasks[n:]
	}
	s.hub.mu.Unlock()
	for _, ref := range old {
		s.vim.Remove(s.svc.Context, ref)
	}
	return t.Self
}

// messageOf is the sentence in a fault, or its type.
func messageOf(fault types.BaseMethodFault) string {
	if m := fault.GetMethodFault(); m != nil && len(m.FaultMessage) > 0 {
		return m.FaultMessage[0].Message
	}
	if f, ok := fault.(mo.Reference); ok {
		return f.Reference().String()
	}
	return typeName(fault)
}

// taskBodies are the responses of methods that return a task.
var taskBodies = map[string]soap.HasFault{
	"Destroy_Task":                      (*methods.Destroy_TaskBody)(nil),
	"UnregisterAndDestroy_Task":         (*methods.UnregisterAndDestroy_TaskBody)(nil),
	"Rename_Task":                       (*methods.Rename_TaskBody)(nil),
	"MoveIntoFolder_Task":               (*methods.MoveIntoFolder_TaskBody)(nil),
	"PowerOnVM_Task":                    (*methods.PowerOnVM_TaskBody)(nil),
	"PowerOffVM_Task":                   (*methods.PowerOffVM_TaskBody)(nil),
	"ResetVM_Task":                      (*methods.ResetVM_TaskBody)(nil),
	"SuspendVM_Task":                    (*methods.SuspendVM_TaskBody)(nil),
	"ReconfigVM_Task":                   (*methods.ReconfigVM_TaskBody)(nil),
	"AttachDisk_Task":                   (*methods.AttachDisk_TaskBody)(nil),
	"DetachDisk_Task":                   (*methods.DetachDisk_TaskBody)(nil),
	"CreateDisk_Task":                   (*methods.CreateDisk_TaskBody)(nil),
	"DeleteVStorageObject_Task":         (*methods.DeleteVStorageObject_TaskBody)(nil),
	"ExtendDisk_Task":                   (*methods.ExtendDisk_TaskBody)(nil),
	"CloneVStorageObject_Task":          (*methods.CloneVStorageObject_TaskBody)(nil),
	"VStorageObjectCreateSnapshot_Task": (*methods.VStorageObjectCreateSnapshot_TaskBody)(nil),
	"DeleteSnapshot_Task":               (*methods.DeleteSnapshot_TaskBody)(nil),
	"CreateDiskFromSnapshot_Task":       (*methods.CreateDiskFromSnapshot_TaskBody)(nil),
	"VslmCreateDisk_Task":               (*vslmmethods.VslmCreateDisk_TaskBody)(nil),
	"VslmDeleteVStorageObject_Task":     (*vslmmethods.VslmDeleteVStorageObject_TaskBody)(nil),
	"VslmExtendDisk_Task":               (*vslmmethods.VslmExtendDisk_TaskBody)(nil),
	"VslmCloneVStorageObject_Task":      (*vslmmethods.VslmCloneVStorageObject_TaskBody)(nil),
	"VslmCreateSnapshot_Task":           (*vslmmethods.VslmCreateSnapshot_TaskBody)(nil),
	"VslmDeleteSnapshot_Task":           (*vslmmethods.VslmDeleteSnapshot_TaskBody)(nil),
	"VslmCreateDiskFromSnapshot_Task":   (*vslmmethods.VslmCreateDiskFromSnapshot_TaskBody)(nil),
	"VslmAttachDisk_Task":               (*vslmmethods.VslmAttachDisk_TaskBody)(nil),
	"CnsCreateVolume":                   (*cnsmethods.CnsCreateVolumeBody)(nil),
	"CnsDeleteVolume":                   (*cnsmethods.CnsDeleteVolumeBody)(nil),
	"CnsExtendVolume":                   (*cnsmethods.CnsExtendVolumeBody)(nil),
	"CnsUpdateVolumeMetadata":           (*cnsmethods.CnsUpdateVolumeBody)(nil),
	"CnsAttachVolume":                   (*cnsmethods.CnsAttachVolumeBody)(nil),
	"CnsDetachVolume":                   (*cnsmethods.CnsDetachVolumeBody)(nil),
	"CnsCreateSnapshots":                (*cnsmethods.CnsCreateSnapshotsBody)(nil),
	"CnsDeleteSnapshots":                (*cnsmethods.CnsDeleteSnapshotBody)(nil),
	"CnsQuerySnapshots":                 (*cnsmethods.CnsQuerySnapshotsBody)(nil),
	"CnsQueryVolumeInfo":                (*cnsmethods.CnsQueryVolumeInfoBody)(nil),
}

// taskBody is the response of a method that returns a task.
func taskBody(name string, task types.ManagedObjectReference) soap.HasFault {
	body, ok := taskBodies[name]
	if !ok {
		return refuse(&types.InvalidRequest{RuntimeFault: reason(name + " returns no task")})
	}
	if strings.HasPrefix(name, "Vslm") { // VSLM has its own way to ask
		task.Type = "VslmTask"
	}
	made := reflect.New(reflect.TypeOf(body).Elem())
	res := made.Elem().FieldByName("Res")
	res.Set(reflect.New(res.Type().Elem()))
	res.Elem().FieldByName("Returnval").Set(reflect.ValueOf(task))
	return made.Interface().(soap.HasFault)
}

// A refusal is a response of any method that is a fault.
type refusal struct{ fault *soap.Fault }

func (r *refusal) Fault() *soap.Fault { return r.fault }

func refuse(fault types.BaseMethodFault) soap.HasFault {
	return &refusal{simulator.Fault(messageOf(fault), fault)}
}
