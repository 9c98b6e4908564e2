package cri

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxQueuedEvents is how far a reader of events may fall behind before it is
// cut off; it then lists and subscribes again.
const maxQueuedEvents = 8192

// A subscription is one reader's queue of events, in the store's order.
type subscription struct {
	mu    sync.Mutex
	queue []event
	err   error
	ended bool
	wake  chan struct{}
}

func (s *store) subscribe() *subscription {
	sub := &subscription{wake: make(chan struct{}, 1)}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.subs[sub] = struct{}{}
	return sub
}

func (s *store) unsubscribe(sub *subscription) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.subs, sub)
}

func (q *subscription) push(e event) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.ended {
		return
	}
	if len(q.queue) >= maxQueuedEvents {
		q.ended = true
		q.err = fmt.Errorf("reader of container events is %d events behind: list, then subscribe again: %w", len(q.queue), errdefs.ErrResourceExhausted)
	} else {
		q.queue = append(q.queue, e)
	}
	q.signal()
}

func (q *subscription) end(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.ended, q.err = true, err
	q.signal()
}

func (q *subscription) signal() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// next waits for events and returns all that are queued; more is false once
// the subscription has ended.
func (q *subscription) next(ctx context.Context) (events []event, more bool, err error) {
	for {
		q.mu.Lock()
		events, q.queue = q.queue, nil
		ended, err := q.ended, q.err
		q.mu.Unlock()
		if len(events) > 0 {
			return events, true, nil
		}
		if ended {
			return nil, false, err
		}
		select {
		case <-q.wake:
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
	}
}

// emit numbers a change and hands it to all readers; mu is held.
func (s *store) emit(sandboxID, containerID string, typ runtimeapi.ContainerEventType) {
	sb, ok := s.sandboxes[sandboxID]
	if !ok {
		return
	}
	msg := &runtimeapi.ContainerEventResponse{
		ContainerId:        containerID,
		ContainerEventType: typ,
		CreatedAt:          time.Now().UnixNano(),
		PodSandboxStatus:   sandboxStatus(sb),
	}
	for _, c := range s.containersOfLocked(sandboxID) {
		msg.ContainersStatuses = append(msg.ContainersStatuses, containerStatus(c))
	}
	s.broadcast(event{PodUID: sb.VM.PodUID, Msg: msg})
}

// emitGone tells that a sandbox was removed; mu is held.
func (s *store) emitGone(sb *sandbox, id string) {
	s.broadcast(event{PodUID: sb.VM.PodUID, Msg: &runtimeapi.ContainerEventResponse{
		ContainerId:        id,
		ContainerEventType: runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT,
		CreatedAt:          time.Now().UnixNano(),
		PodSandboxStatus:   sandboxStatus(sb),
	}})
}

func (s *store) broadcast(e event) {
	s.seq++
	e.Seq = s.seq
	for sub := range s.subs {
		sub.push(e)
	}
}

// Subscribe has fn called after every change of a pod's sandboxes or
// containers, in the order of the changes, from one goroutine. While fn blocks,
// later changes wait; if thousands do, some are passed over. It ends with the
// server.
func (s *Server) Subscribe(fn func(podUID string)) {
	sub := s.store.subscribe()
	s.background.Go(func() {
		for s.ctx.Err() == nil {
			s.deliver(sub, fn)
			s.store.unsubscribe(sub)
			sub = s.store.subscribe()
		}
		s.store.unsubscribe(sub)
	})
}

func (s *Server) deliver(sub *subscription, fn func(podUID string)) {
	for {
		events, more, err := sub.next(s.ctx)
		if !more {
			if err != nil && s.ctx.Err() == nil {
				s.log.Error("a subscriber fell behind and missed changes", "err", err)
			}
			return
		}
		for _, e := range events {
			fn(e.PodUID)
		}
	}
}

// GetContainerEvents streams changes in the store's order, from now on.
func (r *runtimeService) GetContainerEvents(_ *runtimeapi.GetEventsRequest, stream runtimeapi.RuntimeService_GetContainerEventsServer) error {
	sub := r.store.subscribe()
	defer r.store.unsubscribe(sub)
	for {
		events, more, err := sub.next(stream.Context())
		if !more {
			return err
		}
		for _, e := range events {
			if err := stream.Send(e.Msg); err != nil {
				return err
			}
		}
	}
}
