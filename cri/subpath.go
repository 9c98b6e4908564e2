package cri

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// PrepareSubPath has the guest of a pod look up the sub-path of a volume, and
// make what is missing of it, before a container that mounts it is created:
// for a kubelet in this process, which asks for that then. path is what the
// CRI mount will name, the volume's directory with the sub-path below it. The
// guest is given the volume first, as by CreateContainer, which finds it there;
// it stays with the pod. It may be repeated.
//
// An error is the guest's word on the sub-path, or says that ctx has ended.
// Whatever else is in the way, such as a disk that another VM has, is left to
// CreateContainer: it comes next, meets the same, and the kubelet shows its
// errors in full. A guest of an older version looks at sub-paths only there.
func (s *Server) PrepareSubPath(ctx context.Context, podUID, path string) error {
	podDir := filepath.Join(s.config.KubeletRoot, "pods", podUID)
	rel, ok := below(podDir, path)
	if !ok || !strings.HasPrefix(rel, "volumes/") {
		// Admission has refused those: on this host a sub-path could lead anywhere.
		return refuse("subPath", fmt.Sprintf("%s is in no volume that the pod's VM has for itself: put it into hostPath.path instead", path))
	}
	vol, sub, _, err := classifyKubelet(podDir, rel)
	if err == nil && sub != "" {
		err = s.prepareSubPath(ctx, podUID, *vol, sub)
	}
	var verdict *subPathError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &verdict):
		return verdict
	case ctx.Err() != nil:
		return fmt.Errorf("sub-path %q: %w", sub, err)
	}
	s.log.Info("a sub-path could not be looked at; CreateContainer tells why", "pod_uid", podUID, "path", path, "err", err)
	return nil
}

// A subPathError is what a guest has against a sub-path. Users read it, so it
// does not name the call.
type subPathError struct{ err error }

func (e *subPathError) Error() string {
	return strings.TrimPrefix(e.err.Error(), "agent PrepareSubPath: ")
}
func (e *subPathError) Unwrap() error { return e.err }

func (s *Server) prepareSubPath(ctx context.Context, podUID string, vol volume, sub string) error {
	sandboxes := s.store.sandboxesOfPod(podUID) // the newest first
	i := slices.IndexFunc(sandboxes, func(sb *sandbox) bool { return sb.State == runtimeapi.PodSandboxState_SANDBOX_READY })
	if i < 0 {
		return fmt.Errorf("no sandbox of the pod is ready: %w", errdefs.ErrFailedPrecondition)
	}
	p, _, err := s.podOf(sandboxes[i].ID)
	if err != nil {
		return err
	}
	unlock, err := p.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	done, err := s.turns.take(ctx, p.clock, true)
	if err != nil {
		return fmt.Errorf("wait for a turn: %w", err)
	}
	defer done()
	defer p.clock.step(vmpod.PhaseContainer, "sub-path")()
	_, sb, err := s.podOf(p.id) // it may have been stopped meanwhile
	if err != nil || !slices.Contains(sb.Features, agentapi.FeatureSubPaths) {
		return err
	}
	if err := p.ensureVolumes(ctx, []volume{vol}); err != nil {
		return err
	}
	_, err = call(ctx, p.link, agentapi.AgentService.PrepareSubPath, &agentapi.PrepareSubPathRequest{Volume: vol.ID, SubPath: sub})
	if err == nil || unheard(err) || ctx.Err() != nil {
		return err
	}
	return &subPathError{err}
}

// unheard says that a guest's error is not about what it was asked.
func unheard(err error) bool {
	return errdefs.IsUnavailable(err) || errdefs.IsNotFound(err) || errdefs.IsNotImplemented(err) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}
