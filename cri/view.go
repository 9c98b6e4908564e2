package cri

import (
	"context"
	"maps"
	"slices"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/netplugin"
	"github.com/openatoll/atoll/vmpod"
)

// A View is what `crictl info` shows: counts, not secrets.
type View struct {
	Runtime    string            `json:"runtime"`
	Version    string            `json:"version"`
	StreamAddr string            `json:"streamAddr"`
	Sandboxes  int               `json:"sandboxes"`
	Ready      int               `json:"ready"`
	Containers map[string]int    `json:"containers"`
	Prepared   []string          `json:"prepared,omitempty"`
	Events     uint64            `json:"events"`
	Host       map[string]string `json:"host,omitempty"`
	Errors     map[string]string `json:"errors,omitempty"`
}

// View returns the server's state for people.
func (s *Server) View(ctx context.Context) View {
	v := View{Runtime: RuntimeName, Version: s.config.Version, StreamAddr: s.streams.Addr().String(), Containers: map[string]int{}, Errors: map[string]string{}}
	for _, sb := range s.store.allSandboxes() {
		v.Sandboxes++
		if sb.State == runtimeapi.PodSandboxState_SANDBOX_READY {
			v.Ready++
		}
	}
	for _, c := range s.store.allContainers() {
		v.Containers[stateName(c.State)]++
	}
	s.mu.Lock()
	for vm := range s.preps {
		v.Prepared = append(v.Prepared, vm.String())
	}
	s.mu.Unlock()
	slices.Sort(v.Prepared)
	s.store.mu.RLock()
	v.Events = s.store.seq
	s.store.mu.RUnlock()
	if s.config.Info != nil {
		v.Host = maps.Clone(s.config.Info())
	}
	if err := s.config.Network.Ready(ctx); err != nil {
		v.Errors["network"] = err.Error()
	}
	if err := s.runtimeReady(ctx); err != nil {
		v.Errors["hypervisor"] = err.Error()
	}
	return v
}

// sandboxView is the verbose part of PodSandboxStatus.
type sandboxView struct {
	VM         string               `json:"vm"`
	UUID       string               `json:"uuid"`
	PID        int                  `json:"pid,omitempty"`
	State      vmpod.State          `json:"state"`
	Reason     string               `json:"reason,omitempty"`
	Message    string               `json:"message,omitempty"`
	CPUs       int                  `json:"cpus"`
	Memory     int64                `json:"memory"`
	Prepared   bool                 `json:"prepared"`
	Features   []string             `json:"guestFeatures,omitempty"`
	Volumes    []string             `json:"volumes,omitempty"`
	Attachment netplugin.Attachment `json:"attachment"`
}

func (s *Server) sandboxView(ctx context.Context, sb *sandbox) sandboxView {
	v := sandboxView{
		VM: sb.VM.String(), UUID: sb.VM.UUID().String(), State: vmpod.StateStopped, Reason: sb.Reason, Message: sb.Message,
		CPUs: sb.CPUs, Memory: sb.Memory, Prepared: sb.Hint != nil, Features: sb.Features, Attachment: sb.Attachment,
	}
	for _, vol := range sb.Volumes {
		v.Volumes = append(v.Volumes, vol.ID)
	}
	if p := s.livePod(sb.ID); p != nil {
		if st, err := p.machine.Status(ctx); err == nil {
			v.State, v.PID = st.State, st.PID
			v.Reason, v.Message = firstOf(st.Reason, v.Reason), firstOf(st.Message, v.Message)
			if f := p.unwell(); f.Reason != "" && st.Reason == "" {
				v.Reason, v.Message = f.Reason, f.Message
			}
		} else {
			v.State, v.Message = vmpod.StateUnknown, err.Error()
		}
	}
	return v
}

// containerView is the verbose part of ContainerStatus; the environment, which
// may hold secrets, stays out.
type containerView struct {
	SandboxID string                         `json:"sandboxID"`
	ImageID   string                         `json:"imageID"`
	User      *runtimeapi.LinuxContainerUser `json:"user,omitempty"`
	Mounts    []*runtimeapi.Mount            `json:"mounts,omitempty"`
	LogOffset uint64                         `json:"logOffset"`
}

func (s *Server) containerView(c *container) containerView {
	v := containerView{SandboxID: c.SandboxID, ImageID: c.ImageID, User: c.User, Mounts: c.Mounts}
	if cur, err := s.store.cursor(c.ID); err == nil {
		v.LogOffset = cur.Offset
	}
	if p := s.livePod(c.SandboxID); p != nil {
		if pump := p.process(c.ID).logPump(); pump != nil {
			v.LogOffset = pump.written()
		}
	}
	return v
}
