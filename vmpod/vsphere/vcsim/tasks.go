package vcsim

import (
	"time"

	"github.com/google/uuid"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// maxTasks are kept; older ones are forgotten, as a vCenter forgets them after
// ten minutes.
const maxTasks = 2000

// task returns the response of a _Task method whose work is done already: the
// task has ended, with result or fault. A stuck one runs for ever.
func (c *call) task(result types.AnyType, fault types.BaseMethodFault, stuck bool) soap.HasFault {
	return taskBody(c.name, c.s.putTask(c, result, fault, stuck))
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

// taskBody is the response of a _Task method.
func taskBody(name string, task types.ManagedObjectReference) soap.HasFault {
	switch name {
	case "Destroy_Task":
		return &methods.Destroy_TaskBody{Res: &types.Destroy_TaskResponse{Returnval: task}}
	case "UnregisterAndDestroy_Task":
		return &methods.UnregisterAndDestroy_TaskBody{Res: &types.UnregisterAndDestroy_TaskResponse{Returnval: task}}
	case "Rename_Task":
		return &methods.Rename_TaskBody{Res: &types.Rename_TaskResponse{Returnval: task}}
	case "MoveIntoFolder_Task":
		return &methods.MoveIntoFolder_TaskBody{Res: &types.MoveIntoFolder_TaskResponse{Returnval: task}}
	case "PowerOnVM_Task":
		return &methods.PowerOnVM_TaskBody{Res: &types.PowerOnVM_TaskResponse{Returnval: task}}
	case "PowerOffVM_Task":
		return &methods.PowerOffVM_TaskBody{Res: &types.PowerOffVM_TaskResponse{Returnval: task}}
	case "ResetVM_Task":
		return &methods.ResetVM_TaskBody{Res: &types.ResetVM_TaskResponse{Returnval: task}}
	case "SuspendVM_Task":
		return &methods.SuspendVM_TaskBody{Res: &types.SuspendVM_TaskResponse{Returnval: task}}
	}
	return refuse(&types.InvalidRequest{RuntimeFault: reason(name + " returns no task")})
}

// A refusal is a response of any method that is a fault.
type refusal struct{ fault *soap.Fault }

func (r *refusal) Fault() *soap.Fault { return r.fault }

func refuse(fault types.BaseMethodFault) soap.HasFault {
	return &refusal{simulator.Fault(messageOf(fault), fault)}
}
