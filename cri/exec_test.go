package cri

import (
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A guest that is slow starts what nobody waits for any more: it is killed.
func TestAbandonedExecIsKilled(t *testing.T) {
	h := newFakeHost()
	s := serve(t, h, t.TempDir())
	id := s.run(t)
	c := s.create(t, id, ctrConfig("main"))
	s.start(t, c)
	release := h.holdAt("start")
	_, err := s.rt.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: c, Cmd: []string{"sleep"}, Timeout: 1})
	if status.Code(err) != codes.DeadlineExceeded {
		t.Fatalf("exec that does not start in time: %v", err)
	}
	release()
	g := h.guest(podUID)
	eventually(t, "the exec killed", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		for _, x := range g.containers[c].execs {
			select {
			case <-x.done:
				return x.code == 128+9
			default:
			}
		}
		return false
	})
}
