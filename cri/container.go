package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// findContainer finds a container by its id or by a prefix that only it has.
func (s *Server) findContainer(id string) (*container, error) {
	if id == "" {
		return nil, refuse("container_id", "it is empty")
	}
	if c, ok := s.store.container(id); ok {
		return c, nil
	}
	var found *container
	for _, c := range s.store.allContainers() {
		if strings.HasPrefix(c.ID, id) {
			if found != nil {
				return nil, refuse("container_id", fmt.Sprintf("%q fits several containers: give more of it", id))
			}
			found = c
		}
	}
	if found == nil {
		return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
	}
	return found, nil
}

// runningContainer finds a container that runs, and its pod.
func (s *Server) runningContainer(id string) (*container, *pod, error) {
	c, err := s.findContainer(id)
	if err != nil {
		return nil, nil, err
	}
	p, _, err := s.podOf(c.SandboxID)
	if err != nil {
		return nil, nil, fmt.Errorf("container %s: %w", c.ID, err)
	}
	if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil, nil, fmt.Errorf("container %s is not running (%s): %w", c.ID, stateName(c.State), errdefs.ErrFailedPrecondition)
	}
	return c, p, nil
}

func stateName(s runtimeapi.ContainerState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "CONTAINER_"))
}

// StartContainer runs a created container. Starting one that runs succeeds.
func (r *runtimeService) StartContainer(ctx context.Context, req *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error) {
	c, err := r.findContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	p, _, err := r.podOf(c.SandboxID)
	if err != nil {
		return nil, err
	}
	unlock, err := p.process(c.ID).lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if c, err = r.findContainer(c.ID); err != nil {
		return nil, err
	}
	switch c.State {
	case runtimeapi.ContainerState_CONTAINER_CREATED:
	case runtimeapi.ContainerState_CONTAINER_RUNNING:
		return &runtimeapi.StartContainerResponse{}, nil
	default:
		return nil, fmt.Errorf("container %s has ended and cannot be started again: create a new attempt: %w", c.ID, errdefs.ErrFailedPrecondition)
	}
	done, err := p.s.turns.take(ctx, p.clock, true)
	if err != nil {
		return nil, fmt.Errorf("start container %s (%s): wait for a turn: %w", c.ID, c.Config.Metadata.Name, err)
	}
	ended := p.clock.step(vmpod.PhaseContainer, "start")
	err = p.startContainer(ctx, c)
	ended()
	done()
	if err != nil {
		return nil, fmt.Errorf("start container %s (%s): %w", c.ID, c.Config.Metadata.Name, err)
	}
	p.started()
	return &runtimeapi.StartContainerResponse{}, nil
}

func (p *pod) startContainer(ctx context.Context, c *container) error {
	if err := p.startLog(c); err != nil {
		return step("open its log", err)
	}
	failpoint.Hit(failpoint.StartLogOpen)
	resp, err := call(ctx, p.link, agentapi.AgentService.StartProcess, &agentapi.StartProcessRequest{
		ContainerId: c.ID, Stdin: c.Config.GetStdin(), Tty: c.Config.GetTty(),
	})
	if err != nil {
		if !tooLate(ctx, err) && !errdefs.IsUnavailable(err) {
			p.failedStart(c.ID, err)
		}
		return err
	}
	failpoint.Hit(failpoint.StartAgentAnswered)
	err = p.s.store.updateContainer(c.ID, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT, func(c *container) bool {
		return running(c, resp.GetStartedNs())
	})
	if err != nil && !errdefs.IsNotFound(err) {
		p.log.Error("recording a container's start failed; the next start of this process finds it running", "container", c.ID, "err", err)
	}
	failpoint.Hit(failpoint.StartRecorded)
	p.log.Info("container is started", "container", c.ID, "name", c.Config.Metadata.Name)
	return nil
}

// running turns a created container's record into that of a running one; an
// exit that was faster stays, with its start filled in.
func running(c *container, startedNs int64) bool {
	if startedNs > 0 {
		c.StartedAt = guestClock(startedNs)
	}
	if c.StartedAt.Before(c.CreatedAt) {
		c.StartedAt = c.CreatedAt
	}
	if c.State == runtimeapi.ContainerState_CONTAINER_CREATED {
		c.State = runtimeapi.ContainerState_CONTAINER_RUNNING
	}
	return true
}

// tooLate says that a call to the guest failed for want of time: that tells
// nothing of what it asked for, which the guest may still do. The guest knows
// the call's deadline and may find it over first.
func tooLate(ctx context.Context, err error) bool {
	return ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}

// failedStart records a container that could not be started as containerd
// does: exited with 128, reason StartError.
func (p *pod) failedStart(id string, cause error) {
	now := time.Now()
	err := p.s.store.updateContainer(id, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, func(c *container) bool {
		if c.State != runtimeapi.ContainerState_CONTAINER_CREATED {
			return false
		}
		c.State, c.ExitCode, c.Reason = runtimeapi.ContainerState_CONTAINER_EXITED, 128, "StartError"
		c.Message, c.StartedAt, c.FinishedAt = clip(cause.Error(), 4096), now, now
		return true
	})
	if err != nil {
		p.log.Error("recording a failed start failed", "container", id, "err", err)
	}
	p.process(id).markExited()
}

// StopContainer asks the container to end, waits, then kills it. Stopping one
// that does not run succeeds.
func (r *runtimeService) StopContainer(ctx context.Context, req *runtimeapi.StopContainerRequest) (*runtimeapi.StopContainerResponse, error) {
	c, err := r.findContainer(req.GetContainerId())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.StopContainerResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := r.stopContainer(ctx, c, seconds(req.GetTimeout())); err != nil {
		return nil, fmt.Errorf("stop container %s (%s): %w", c.ID, c.Config.Metadata.Name, err)
	}
	return &runtimeapi.StopContainerResponse{}, nil
}

func (s *Server) stopContainer(ctx context.Context, c *container, grace time.Duration) error {
	if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil
	}
	p := s.livePod(c.SandboxID)
	if p == nil {
		return nil // its machine has ended: the record says so, or will
	}
	x := p.process(c.ID)
	if grace > 0 {
		if gone, err := p.signal(ctx, c.ID, stopSignal(c), false); gone || err != nil {
			return p.awaitExit(ctx, x, err)
		}
		t := time.NewTimer(grace)
		defer t.Stop()
		select {
		case <-x.exited:
			return nil
		case <-p.dead:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
			p.log.Info("container did not end in its grace period, killing it", "container", c.ID, "grace", grace)
		}
	}
	_, err := p.signal(ctx, c.ID, syscall.SIGKILL, true)
	return p.awaitExit(ctx, x, err)
}

// signalPatience bounds the wait for a guest to take a signal. A guest that
// does not answer is no reason to keep whoever deletes the pod waiting: stopping
// the sandbox needs no answer.
const signalPatience = 30 * time.Second

// signal sends a signal; gone says that the guest has no such process any
// more, so that its exit is on the way.
func (p *pod) signal(ctx context.Context, id string, sig syscall.Signal, all bool) (gone bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, signalPatience)
	defer cancel()
	_, err = call(ctx, p.link, agentapi.AgentService.SignalProcess, &agentapi.SignalProcessRequest{ContainerId: id, Signal: uint32(sig), All: all})
	failpoint.Hit(failpoint.StopSignalled)
	if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
		return true, nil
	}
	return false, err
}

func (p *pod) awaitExit(ctx context.Context, x *process, err error) error {
	if err != nil {
		select {
		case <-p.dead: // it ended with its machine
			return nil
		case <-x.exited:
			return nil
		default:
			return err
		}
	}
	select {
	case <-x.exited:
		return nil
	case <-p.dead:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("it was killed, but the guest has not told its end: %w", ctx.Err())
	}
}

// RemoveContainer kills the container if need be and erases it. Removing what
// is gone succeeds. Its log file belongs to the caller.
func (r *runtimeService) RemoveContainer(ctx context.Context, req *runtimeapi.RemoveContainerRequest) (*runtimeapi.RemoveContainerResponse, error) {
	c, err := r.findContainer(req.GetContainerId())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.RemoveContainerResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := r.removeContainer(ctx, c); err != nil {
		return nil, fmt.Errorf("remove container %s (%s): %w", c.ID, c.Config.Metadata.Name, err)
	}
	return &runtimeapi.RemoveContainerResponse{}, nil
}

func (s *Server) removeContainer(ctx context.Context, c *container) error {
	if p := s.livePod(c.SandboxID); p != nil {
		x := p.process(c.ID)
		unlock, err := x.lock(ctx)
		if err != nil {
			return err
		}
		defer unlock()
		if c, err = s.findContainer(c.ID); errdefs.IsNotFound(err) {
			return nil
		}
		if err := s.stopContainer(ctx, c, 0); err != nil {
			return err
		}
		failpoint.Hit(failpoint.RemoveKilled)
		sb, ok := s.store.sandbox(c.SandboxID)
		if ok && sb.State == runtimeapi.PodSandboxState_SANDBOX_READY {
			_, err := call(ctx, p.link, agentapi.AgentService.RemoveContainer, &agentapi.RemoveContainerRequest{Id: c.ID})
			if err != nil && !errdefs.IsNotFound(err) && !isClosed(p.dead) {
				return err
			}
		}
		failpoint.Hit(failpoint.RemoveGuestRemoved)
		if pump := x.logPump(); pump != nil {
			pump.stop()
			<-pump.done
		}
		p.mu.Lock()
		delete(p.procs, c.ID)
		p.mu.Unlock()
	}
	s.samples.forget(c.ID)
	err := s.store.removeContainer(c.ID)
	failpoint.Hit(failpoint.RemoveErased)
	return err
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// ContainerStatus reports one container.
func (r *runtimeService) ContainerStatus(_ context.Context, req *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	c, err := r.findContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.ContainerStatusResponse{Status: containerStatus(c)}
	if req.GetVerbose() {
		info, err := json.Marshal(r.containerView(c))
		if err != nil {
			return nil, err
		}
		resp.Info = map[string]string{"info": string(info)}
	}
	return resp, nil
}

func containerStatus(c *container) *runtimeapi.ContainerStatus {
	st := &runtimeapi.ContainerStatus{
		Id:          c.ID,
		Metadata:    c.Config.GetMetadata(),
		State:       c.State,
		CreatedAt:   c.CreatedAt.UnixNano(),
		StartedAt:   nanos(c.StartedAt),
		FinishedAt:  nanos(c.FinishedAt),
		ExitCode:    c.ExitCode,
		Image:       c.Config.GetImage(),
		ImageRef:    c.ImageRef,
		ImageId:     c.ImageID,
		Reason:      c.Reason,
		Message:     c.Message,
		Labels:      c.Config.GetLabels(),
		Annotations: c.Config.GetAnnotations(),
		Mounts:      c.Mounts,
		LogPath:     c.LogPath,
		User:        &runtimeapi.ContainerUser{Linux: c.User},
		StopSignal:  c.StopSignal,
	}
	if c.Resources != nil {
		st.Resources = &runtimeapi.ContainerResources{Linux: c.Resources}
	}
	return st
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// ListContainers lists containers, the newest first.
func (r *runtimeService) ListContainers(_ context.Context, req *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{Containers: r.listContainers(req.GetFilter())}, nil
}

// StreamContainers is ListContainers in parts.
func (r *runtimeService) StreamContainers(req *runtimeapi.StreamContainersRequest, stream runtimeapi.RuntimeService_StreamContainersServer) error {
	return inParts(r.listContainers(req.GetFilter()), func(items []*runtimeapi.Container) error {
		return stream.Send(&runtimeapi.StreamContainersResponse{Containers: items})
	})
}

func (s *Server) listContainers(f *runtimeapi.ContainerFilter) []*runtimeapi.Container {
	var out []*runtimeapi.Container
	for _, c := range s.store.allContainers() {
		if f.GetId() != "" && !strings.HasPrefix(c.ID, f.Id) ||
			f.GetPodSandboxId() != "" && !strings.HasPrefix(c.SandboxID, f.PodSandboxId) ||
			f.GetState() != nil && f.State.State != c.State ||
			!hasLabels(c.Config.GetLabels(), f.GetLabelSelector()) {
			continue
		}
		out = append(out, &runtimeapi.Container{
			Id:           c.ID,
			PodSandboxId: c.SandboxID,
			Metadata:     c.Config.GetMetadata(),
			Image:        c.Config.GetImage(),
			ImageRef:     c.ImageRef,
			ImageId:      c.ImageID,
			State:        c.State,
			CreatedAt:    c.CreatedAt.UnixNano(),
			Labels:       c.Config.GetLabels(),
			Annotations:  c.Config.GetAnnotations(),
		})
	}
	return out
}

// ReopenContainerLog writes on into a new file after a rotation.
func (r *runtimeService) ReopenContainerLog(_ context.Context, req *runtimeapi.ReopenContainerLogRequest) (*runtimeapi.ReopenContainerLogResponse, error) {
	c, err := r.findContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil, fmt.Errorf("container %s is not running: %w", c.ID, errdefs.ErrFailedPrecondition)
	}
	return &runtimeapi.ReopenContainerLogResponse{}, r.reopenLog(c)
}

// CheckpointContainer is not served.
func (r *runtimeService) CheckpointContainer(context.Context, *runtimeapi.CheckpointContainerRequest) (*runtimeapi.CheckpointContainerResponse, error) {
	return nil, fmt.Errorf("checkpoint: a container in a pod VM shares its machine with the pod's others, and the guest has no CRIU: stop the pod instead: %w", errdefs.ErrNotImplemented)
}
