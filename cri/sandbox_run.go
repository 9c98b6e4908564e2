package cri

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/netplugin"
	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// A flight is one RunPodSandbox under way; calls for the same (uid, attempt)
// share it. It is cancelled when the last of them has left.
type flight struct {
	config  *runtimeapi.PodSandboxConfig
	waiters int
	given   bool // up: all have left, and it is being undone
	cancel  context.CancelCauseFunc
	done    chan struct{}
	id      string
	err     error
}

// podUIDPattern is what a pod UID may look like: it names files, machines and
// network marks on the host.
var podUIDPattern = regexp.MustCompile(`^[A-Za-z0-9][-A-Za-z0-9.]{0,62}$`)

func checkPodUID(uid string) error {
	if !podUIDPattern.MatchString(uid) {
		return fmt.Errorf("pod UID %q (metadata.uid): want 1 to 63 letters, digits, '-' or '.': %w", uid, errdefs.ErrInvalidArgument)
	}
	return nil
}

// newID returns a random id in the form that CRI tools expect.
func newID() string {
	var b [32]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// RunPodSandbox joins what Prepare began, or does it all. It is idempotent on
// (uid, attempt): a second call joins the first or returns what it made.
func (r *runtimeService) RunPodSandbox(ctx context.Context, req *runtimeapi.RunPodSandboxRequest) (*runtimeapi.RunPodSandboxResponse, error) {
	config := req.GetConfig()
	if err := checkSandboxConfig(config, req.GetRuntimeHandler()); err != nil {
		return nil, err
	}
	vm := vmpod.ID{PodUID: config.Metadata.Uid, Attempt: config.Metadata.Attempt}
	id, err := r.runSandbox(ctx, vm, config, req.GetRuntimeHandler())
	if err != nil {
		return nil, fmt.Errorf("run sandbox of pod %s/%s: %w", config.Metadata.Namespace, config.Metadata.Name, err)
	}
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: id}, nil
}

func (s *Server) runSandbox(ctx context.Context, vm vmpod.ID, config *runtimeapi.PodSandboxConfig, handler string) (string, error) {
	s.mu.Lock()
	f := s.runs[vm]
	for f != nil && f.given {
		s.mu.Unlock()
		select {
		case <-f.done:
		case <-ctx.Done():
			return "", ctx.Err()
		}
		s.mu.Lock()
		f = s.runs[vm]
	}
	if s.ctx.Err() != nil {
		s.mu.Unlock()
		return "", fmt.Errorf("%w: %w", errServerClosed, errdefs.ErrUnavailable)
	}
	if f == nil {
		if sb, ok := s.store.sandboxOfVM(vm); ok {
			s.mu.Unlock()
			return existing(sb, config)
		}
		fctx, cancel := context.WithCancelCause(trace.ContextWithSpan(s.ctx, trace.SpanFromContext(ctx)))
		f = &flight{config: config, cancel: cancel, done: make(chan struct{})}
		s.runs[vm] = f
		s.background.Add(1)
		go func() {
			defer s.background.Done()
			f.id, f.err = s.makeSandbox(fctx, vm, config, handler)
			s.mu.Lock()
			delete(s.runs, vm)
			s.mu.Unlock()
			cancel(nil)
			close(f.done)
		}()
	} else if !proto.Equal(f.config, config) {
		s.mu.Unlock()
		return "", fmt.Errorf("sandbox attempt %d is being made from another config: wait for it, or raise metadata.attempt: %w", vm.Attempt, errdefs.ErrAlreadyExists)
	}
	f.waiters++
	s.mu.Unlock()

	select {
	case <-f.done:
		return f.id, f.err
	case <-ctx.Done():
	}
	s.mu.Lock()
	f.waiters--
	last := f.waiters == 0
	f.given = f.given || last
	s.mu.Unlock()
	if !last {
		return "", ctx.Err()
	}
	// Nobody waits any more: whoever comes next begins anew, on clean ground.
	f.cancel(ctx.Err())
	return "", fmt.Errorf("given up, everything made is being taken back: %w", ctx.Err())
}

// existing answers for a sandbox that is there already.
func existing(sb *sandbox, config *runtimeapi.PodSandboxConfig) (string, error) {
	switch {
	case sb.State != runtimeapi.PodSandboxState_SANDBOX_READY:
		return "", fmt.Errorf("sandbox %s (attempt %d) exists and is not ready: remove it, or raise metadata.attempt: %w", sb.ID, sb.VM.Attempt, errdefs.ErrAlreadyExists)
	case !proto.Equal(sb.Config, config):
		return "", fmt.Errorf("sandbox %s (attempt %d) exists with another config: remove it, or raise metadata.attempt: %w", sb.ID, sb.VM.Attempt, errdefs.ErrAlreadyExists)
	}
	return sb.ID, nil
}

// makeSandbox gets a machine, gives it its identity and records the sandbox.
// Failing at any step, it leaves nothing.
func (s *Server) makeSandbox(ctx context.Context, vm vmpod.ID, config *runtimeapi.PodSandboxConfig, handler string) (_ string, err error) {
	start := time.Now()
	ports, err := hostPorts(config)
	if err != nil {
		return "", err
	}
	hint := s.hintFor(vm.PodUID)
	kit, err := s.claim(ctx, vm)
	if err != nil {
		return "", err
	}
	joined := kit != nil
	clock := newStartClock()
	if joined {
		clock = kit.clock
		failpoint.Hit(failpoint.RunClaimed)
	}
	defer func() { clock.trace(ctx) }()
	if kit == nil {
		owner := vmpod.Owner{PodUID: vm.PodUID, Namespace: config.Metadata.Namespace, Name: config.Metadata.Name}
		if kit, err = s.bringUp(ctx, clock, vm, owner, s.sizeOf(hint, config), ports); err != nil {
			return "", causeOf(ctx, err)
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(causeOf(ctx, err), s.unmake(vm, kit))
		}
	}()
	if joined && len(ports) > 0 {
		// The hint knew no host ports: the same attachment, asked for again.
		kit.attachment, err = s.config.Network.Attach(ctx, netplugin.Request{Key: vm.String(), Namespace: config.Metadata.Namespace, Name: config.Metadata.Name, HostPorts: ports})
		if err != nil {
			return "", step("forward host ports", err)
		}
	}
	if len(ports) > 0 && !slices.Equal(kit.attachment.HostPorts, ports) {
		return "", fmt.Errorf("port_mappings: this node's network forwards no host ports: use a Service instead of hostPort: %w", errdefs.ErrNotImplemented)
	}
	sb := &sandbox{
		ID: newID(), VM: vm, Config: config, Handler: handler, State: runtimeapi.PodSandboxState_SANDBOX_READY, CreatedAt: time.Now(),
		Hint: hint, CPUs: kit.size.cpus, Memory: kit.size.memory, Attachment: kit.attachment,
	}
	done, err := s.turns.take(ctx, clock, true)
	if err != nil {
		return "", step("wait for a turn", err)
	}
	ended := clock.step(vmpod.PhaseAgent, "setup")
	sb.Features, err = s.setup(ctx, kit, config)
	ended()
	done()
	if err != nil {
		return "", step("set up the guest", err)
	}
	failpoint.Hit(failpoint.RunGuestSetUp)
	p := s.newPod(sb.ID, vm, kit.machine, kit.link)
	p.clock, p.prepared = clock, joined
	if err = s.store.addSandbox(sb); err != nil {
		return "", err
	}
	failpoint.Hit(failpoint.RunRecorded)
	s.mu.Lock()
	s.pods[sb.ID] = p
	s.mu.Unlock()
	p.start()
	s.podVMs.tell(sb.ID)
	s.log.Info("sandbox is ready", "pod_uid", vm.PodUID, "pod", config.Metadata.Namespace+"/"+config.Metadata.Name, "sandbox", sb.ID, "took", time.Since(start), "prepared", joined)
	return sb.ID, nil
}

// causeOf prefers the reason why ctx ended over what that did to a step.
func causeOf(ctx context.Context, err error) error {
	if ctx.Err() == nil || err == nil {
		return err
	}
	return fmt.Errorf("%w (%v)", context.Cause(ctx), err)
}

// hintFor finds the latest hint for a pod: from Prepare, or from an earlier
// sandbox of the same pod.
func (s *Server) hintFor(uid string) *vmpod.Hint {
	s.mu.Lock()
	h := s.hints[uid]
	s.mu.Unlock()
	if h != nil {
		return h
	}
	for _, sb := range s.store.sandboxesOfPod(uid) {
		if sb.Hint != nil {
			return sb.Hint
		}
	}
	return nil
}

// setup gives the guest its identity and returns what its kernel can do.
func (s *Server) setup(ctx context.Context, kit *machineKit, config *runtimeapi.PodSandboxConfig) ([]string, error) {
	hello, err := kit.link.hello(ctx, s.config.Version)
	if err != nil {
		return nil, err
	}
	if err := checkProtocol(hello); err != nil {
		return nil, err
	}
	ids, err := userNamespace("config.linux.security_context.namespace_options.userns_options", config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions())
	if err == nil && ids != nil && !slices.Contains(hello.GetFeatures(), featureUserNamespaces) {
		err = refuse("userns_options", "the guest kernel has no user namespaces: leave hostUsers unset, or use the kernel of `make guest-kernel`")
	}
	if err != nil {
		return nil, err
	}
	var entropy [64]byte
	rand.Read(entropy[:])
	req := &agentapi.SetupSandboxRequest{
		Entropy:       entropy[:],
		Hostname:      config.Hostname,
		MachineId:     machineID(kit.vm),
		VmUuid:        kit.vm.UUID().String(),
		PodUid:        kit.vm.PodUID,
		Interfaces:    interfaces(kit.attachment),
		Sysctls:       config.GetLinux().GetSysctls(),
		SharePid:      config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid() == runtimeapi.NamespaceMode_POD,
		EphemeralDisk: ephemeralDiskID,
		UserNamespace: ids,
	}
	if req.Hostname == "" {
		req.Hostname = hostnameOf(config.Metadata.Name)
	}
	if d := config.DnsConfig; d != nil {
		req.Dns = &agentapi.DNS{Servers: d.Servers, Searches: d.Searches, Options: d.Options}
	}
	var told time.Time
	resp, err := call(ctx, kit.link, func(guest agentapi.AgentService, ctx context.Context, req *agentapi.SetupSandboxRequest) (*agentapi.SetupSandboxResponse, error) {
		told = time.Now() // at each try, which may come late
		req.ClockNs = told.UnixNano()
		return guest.SetupSandbox(ctx, req)
	}, req)
	if err != nil {
		return nil, err
	}
	if err := s.boots.claim(resp.GetBootId(), kit.vm); err != nil {
		return nil, err
	}
	kit.link.setClock(ctx, told, resp.GetClockNs(), s.config.Version)
	if err := takeGrowth(ctx, kit); err != nil {
		return nil, err
	}
	return guestFeatures(hello.GetFeatures()), nil
}

// machineID is the guest's /etc/machine-id: it follows from the VM's identity.
func machineID(vm vmpod.ID) string {
	u := uuid.NewSHA1(vm.UUID(), []byte("machine-id"))
	return hex.EncodeToString(u[:])
}

// hostnameOf makes a host name of a pod's name: at most 63 characters, as the
// kubelet does it.
func hostnameOf(name string) string {
	if len(name) > 63 {
		name = strings.TrimRight(name[:63], "-.")
	}
	return name
}

func interfaces(a netplugin.Attachment) []*agentapi.Interface {
	i := &agentapi.Interface{Mac: a.MAC.String(), Name: "eth0", Mtu: int32(a.MTU)}
	for _, p := range a.Addresses {
		i.Addresses = append(i.Addresses, p.String())
	}
	for _, r := range a.Routes {
		route := &agentapi.Route{Destination: r.Destination.String()}
		if r.Gateway.IsValid() {
			route.Gateway = r.Gateway.String()
		}
		i.Routes = append(i.Routes, route)
	}
	return []*agentapi.Interface{i}
}

// hostPorts reads the mappings that name a host port; a mapping without one
// forwards nothing.
func hostPorts(config *runtimeapi.PodSandboxConfig) ([]netplugin.HostPort, error) {
	var out []netplugin.HostPort
	for _, m := range config.GetPortMappings() {
		if m.HostPort == 0 {
			continue
		}
		p := netplugin.HostPort{Protocol: strings.ToLower(m.Protocol.String()), HostPort: uint16(m.HostPort), ContainerPort: uint16(m.ContainerPort)}
		if m.HostPort < 0 || m.HostPort > 65535 || m.ContainerPort <= 0 || m.ContainerPort > 65535 {
			return nil, fmt.Errorf("port_mappings: %d to %d is not a pair of ports: %w", m.HostPort, m.ContainerPort, errdefs.ErrInvalidArgument)
		}
		if m.HostIp != "" {
			ip, err := netip.ParseAddr(m.HostIp)
			if err != nil {
				return nil, fmt.Errorf("port_mappings: host_ip %q: %w", m.HostIp, errdefs.ErrInvalidArgument)
			}
			p.HostIP = ip
		}
		out = append(out, p)
	}
	return out, nil
}
