package vsphere

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/internal/keylock"
)

// soapBody is what govmomi calls a request or a response.
type soapBody = soap.HasFault

// maxTasks in flight at one vCenter.
const maxTasks = 32

// seenWithin is how soon a watch shows what a task did, mostly: twice as long as
// changes are let gather while there are many, and some time for the task.
const seenWithin = 300 * time.Millisecond

// Tasks runs tasks at one vCenter: at most 32 at a time, one an object. It is
// safe for concurrent use.
type Tasks struct {
	watch *Watch
	slots chan struct{}
	busy  keylock.Locks[types.ManagedObjectReference]
}

// NewTasks uses the watch to hear how tasks end.
func NewTasks(w *Watch) *Tasks {
	return &Tasks{watch: w, slots: make(chan struct{}, maxTasks)}
}

// Do starts a task on an object and waits for its end. A task that failed is a
// *FaultError, for Error. Where ctx ends first, or vCenter has forgotten the
// task, the error is ErrUnavailable: it may still succeed, and Join may tell.
//
// No task's id is kept here. Most may be started twice: a second removal finds
// nothing (IsNotFound), a second move or change of a name changes nothing, and
// vCenter runs the two one after the other. Whoever starts another keeps the id
// that start returns.
func (t *Tasks) Do(ctx context.Context, object types.ManagedObjectReference, start func(context.Context) (types.ManagedObjectReference, error)) (types.AnyType, error) {
	return t.DoUnlessSeen(ctx, object, nil, start)
}

// DoUnlessSeen is Do for a task whose whole effect a watch shows: it returns nil,
// without asking how the task ended, when seen is closed because the object is as
// the task was to make it. It asks where that does not happen soon.
func (t *Tasks) DoUnlessSeen(ctx context.Context, object types.ManagedObjectReference, seen <-chan struct{}, start func(context.Context) (types.ManagedObjectReference, error)) (types.AnyType, error) {
	release, err := t.acquire(ctx, object)
	if err != nil {
		return nil, err
	}
	defer release()
	ref, err := start(ctx)
	if err != nil {
		return nil, err
	}
	if seen != nil {
		soon := time.NewTimer(seenWithin)
		defer soon.Stop()
		select {
		case <-seen:
			return nil, nil
		case <-soon.C:
		case <-ctx.Done(): // which Join tells
		}
	}
	return t.Join(ctx, ref.Value)
}

// Join waits for a task that was started before, by id.
func (t *Tasks) Join(ctx context.Context, id string) (types.AnyType, error) {
	ref := types.ManagedObjectReference{Type: "Task", Value: id}
	wait := t.watch.task(ctx, ref)
	select {
	case <-wait.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("task %s has not ended in time, and may still: %w: %w", id, ctx.Err(), errdefs.ErrUnavailable)
	}
	switch {
	case wait.unknown != nil:
		return nil, wait.unknown
	case wait.state == types.TaskInfoStateSuccess:
		return wait.result, nil
	case wait.failure != nil:
		return nil, &FaultError{Reason: wait.failure.LocalizedMessage, Method: asFault(wait.failure.Fault)}
	}
	return nil, fmt.Errorf("task %s failed without a reason: %w", id, errdefs.ErrUnknown)
}

func (t *Tasks) acquire(ctx context.Context, object types.ManagedObjectReference) (release func(), err error) {
	free, err := t.busy.Lock(ctx, object)
	if err != nil {
		return nil, tooLate(ctx, object)
	}
	select {
	case t.slots <- struct{}{}:
		return func() { <-t.slots; free() }, nil
	case <-ctx.Done():
		free()
		return nil, tooLate(ctx, object)
	}
}

func tooLate(ctx context.Context, object types.ManagedObjectReference) error {
	return fmt.Errorf("other tasks on %s or this vCenter took too long; none was started: %w: %w", object.Value, ctx.Err(), errdefs.ErrUnavailable)
}
