package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// kubeletUIDLabel marks sandboxes that a kubelet asked for.
const kubeletUIDLabel = "io.kubernetes.pod.uid"

// CreateContainer gives the guest the image disk, the volumes and the spec. It
// is idempotent on (sandbox, name, attempt) as long as the container was not
// started.
func (r *runtimeService) CreateContainer(ctx context.Context, req *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	found, err := r.findSandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	config := req.GetConfig()
	if err := checkContainerConfig(config); err != nil {
		return nil, err
	}
	p, _, err := r.podOf(found.ID)
	if err != nil {
		return nil, err
	}
	unlock, err := p.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	done, err := p.s.turns.take(ctx, p.clock, true)
	if err != nil {
		return nil, fmt.Errorf("create container %s: wait for a turn: %w", config.Metadata.Name, err)
	}
	defer done()
	defer p.clock.step(vmpod.PhaseContainer, "create")()
	_, sb, err := r.podOf(found.ID) // it may have been stopped meanwhile
	if err != nil {
		return nil, err
	}
	// A resize that restarts containers tells nobody else of larger requests.
	if err := p.makeRoomLocked(ctx, size{}); err != nil {
		p.log.Warn("the pod VM does not grow to what the pod is to have now", "err", err)
	}
	id, err := p.createContainer(ctx, sb, config)
	if errors.Is(err, crierrors.ErrImageVolumeMountFailed) {
		return nil, err // the kubelet looks at its first words
	}
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", config.Metadata.Name, err)
	}
	return &runtimeapi.CreateContainerResponse{ContainerId: id}, nil
}

// existingContainer finds what an earlier call made.
func (p *pod) existingContainer(config *runtimeapi.ContainerConfig) (string, error) {
	for _, c := range p.s.store.containersOf(p.id) {
		m := c.Config.GetMetadata()
		if m.GetName() != config.Metadata.Name || m.GetAttempt() != config.Metadata.Attempt {
			continue
		}
		if c.State != runtimeapi.ContainerState_CONTAINER_CREATED || !proto.Equal(c.Config, config) {
			return "", fmt.Errorf("attempt %d of it exists as %s: remove that, or raise metadata.attempt: %w", m.GetAttempt(), c.ID, errdefs.ErrAlreadyExists)
		}
		return c.ID, nil
	}
	return "", nil
}

func (p *pod) createContainer(ctx context.Context, sb *sandbox, config *runtimeapi.ContainerConfig) (_ string, err error) {
	if id, err := p.existingContainer(config); id != "" || err != nil {
		return id, err
	}
	s := p.s
	_, fromKubelet := sb.Config.GetLabels()[kubeletUIDLabel]
	plan, err := planMounts(s.mountRules(sb, fromKubelet), config.GetMounts())
	if err != nil {
		return "", err
	}
	if err := plan.planDevices(s.mountRules(sb, fromKubelet), config.GetDevices()); err != nil {
		return "", err
	}
	img, disk, err := p.imageDisk(ctx, config)
	if err != nil {
		return "", err
	}
	if err := p.plugImageVolumes(ctx, plan); err != nil {
		return "", err
	}
	failpoint.Hit(failpoint.CreateImageReady)
	spec, err := p.specFor(sb, config, img, disk)
	if err != nil {
		return "", err
	}
	plan.addHosts(fromKubelet)
	if err := p.ensureVolumes(ctx, plan.volumes); err != nil {
		return "", err
	}
	c := newContainer(sb, config, img, plan, spec)
	req := &agentapi.CreateContainerRequest{
		Id: c.ID, ImageDisk: disk.ID, Mounts: plan.mounts, Devices: plan.devices,
		ReadonlyRootfs: config.GetLinux().GetSecurityContext().GetReadonlyRootfs(),
		Tty:            config.GetTty(), Stdin: config.GetStdin(), StdinOnce: config.GetStdinOnce(),
	}
	if plan.termination != nil {
		req.TerminationMessagePath = plan.termination.ContainerPath
	}
	spec.Hostname = ""
	if req.Spec, err = json.Marshal(spec); err != nil {
		return "", err
	}
	if c.Process, err = json.Marshal(spec.Process); err != nil {
		return "", err
	}
	if err = p.createInGuest(ctx, req); err != nil {
		return "", err
	}
	failpoint.Hit(failpoint.CreateAgentAnswered)
	if err = s.store.addContainer(c); err != nil {
		p.forgetGuestContainer(c.ID)
		return "", err
	}
	failpoint.Hit(failpoint.CreateRecorded)
	p.process(c.ID)
	p.log.Info("container is created", "container", c.ID, "name", config.Metadata.Name, "image", config.Image.Image)
	return c.ID, nil
}

// forgetGuestContainer takes back what CreateContainer may have made in the
// guest, whatever became of the caller.
func (p *pod) forgetGuestContainer(id string) {
	ctx, cancel := context.WithTimeout(p.ctx, reclaimTimeout)
	defer cancel()
	if _, err := call(ctx, p.link, agentapi.AgentService.RemoveContainer, &agentapi.RemoveContainerRequest{Id: id}); err != nil && !errdefs.IsNotFound(err) && p.ctx.Err() == nil {
		p.log.Warn("a container that was not created could not be removed from the guest", "container", id, "err", err)
	}
}

// imageDisk finds the container's image and sees to it that the machine has
// its disk.
func (p *pod) imageDisk(ctx context.Context, config *runtimeapi.ContainerConfig) (storage.Image, storage.ImageDisk, error) {
	ref := firstOf(config.Image.GetImageRef(), config.Image.Image)
	img, err := p.s.config.Images.Get(ctx, ref)
	if errdefs.IsNotFound(err) && ref != config.Image.Image {
		img, err = p.s.config.Images.Get(ctx, config.Image.Image)
	}
	if err != nil {
		return img, storage.ImageDisk{}, err
	}
	disk, err := p.plugImage(ctx, img)
	return img, disk, err
}

// plugImage gives the machine an image's disk, unless it has it.
func (p *pod) plugImage(ctx context.Context, img storage.Image) (storage.ImageDisk, error) {
	disk, err := p.s.config.Images.Disk(ctx, img.ID, p.vm.String())
	if err != nil {
		return disk, err
	}
	d := imageDisk(disk)
	if slices.ContainsFunc(p.machine.Spec().Disks, func(o vmpod.Disk) bool { return o.ID == d.ID }) {
		return disk, nil
	}
	plugger, ok := p.machine.(vmpod.Plugger)
	if !ok {
		return disk, fmt.Errorf("image %s came after the pod VM was launched, and this hypervisor cannot add disks to a running one: pull it before the pod starts: %w", img.ID, errdefs.ErrFailedPrecondition)
	}
	return disk, step("plug the image's disk", plugger.Plug(ctx, vmpod.Device{Disk: &d}))
}

func (p *pod) specFor(sb *sandbox, config *runtimeapi.ContainerConfig, img storage.Image, disk storage.ImageDisk) (*specs.Spec, error) {
	sc := config.GetLinux().GetSecurityContext()
	if err := p.checkPID(sb, sc.GetNamespaceOptions()); err != nil {
		return nil, err
	}
	if err := checkUserNamespace(sb, sc.GetNamespaceOptions()); err != nil {
		return nil, err
	}
	tree, closer, err := p.s.openTree(img.ID, disk)
	if err != nil {
		return nil, err
	}
	defer closer.Close()
	user, err := resolveUser(tree, img.Config.Config.User, sc)
	if err != nil {
		return nil, err
	}
	choice, err := chooseSeccomp(sc, p.s.config.KubeletRoot, sb.Features)
	if err != nil {
		return nil, err
	}
	return buildSpec(specInput{
		id: "container", hostname: firstOf(sb.Config.GetHostname(), hostnameOf(sb.Config.GetMetadata().GetName())),
		image: img.Config.Config, config: config, user: user, seccomp: choice,
	})
}

// checkPID holds a container's choice of processes against the sandbox's.
func (p *pod) checkPID(sb *sandbox, o *runtimeapi.NamespaceOption) error {
	shared := sb.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid() == runtimeapi.NamespaceMode_POD
	switch o.GetPid() {
	case runtimeapi.NamespaceMode_TARGET:
		target, ok := p.s.store.container(o.GetTargetId())
		if !ok || target.SandboxID != sb.ID || target.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			return refuse("namespace_options.target_id", fmt.Sprintf("%q is not a running container of this sandbox", o.GetTargetId()))
		}
	case runtimeapi.NamespaceMode_POD:
		if !shared && o != nil {
			return refuse("namespace_options.pid", "POD in a sandbox that was made with CONTAINER: give the sandbox the same option")
		}
	case runtimeapi.NamespaceMode_CONTAINER:
		if shared {
			return refuse("namespace_options.pid", "CONTAINER in a sandbox whose containers share their processes: give the sandbox the same option")
		}
	}
	return nil
}

func newContainer(sb *sandbox, config *runtimeapi.ContainerConfig, img storage.Image, plan *mountPlan, spec *specs.Spec) *container {
	c := &container{
		ID: newID(), SandboxID: sb.ID, Config: config, ImageID: img.ID, ImageRef: imageRef(img),
		State: runtimeapi.ContainerState_CONTAINER_CREATED, CreatedAt: time.Now(),
		Mounts: plan.reported, Termination: plan.termination, Resources: config.GetLinux().GetResources(),
		StopSignal: config.GetStopSignal(),
	}
	if dir := sb.Config.GetLogDirectory(); dir != "" && config.GetLogPath() != "" {
		c.LogPath = filepath.Join(dir, config.LogPath)
	}
	if c.StopSignal == runtimeapi.Signal_RUNTIME_DEFAULT {
		c.StopSignal = toCRISignal(img.Config.Config.StopSignal)
	}
	u := spec.Process.User
	c.User = &runtimeapi.LinuxContainerUser{Uid: int64(u.UID), Gid: int64(u.GID)}
	for _, g := range u.AdditionalGids {
		c.User.SupplementalGroups = append(c.User.SupplementalGroups, int64(g))
	}
	return c
}

// imageRef is what the kubelet shows as the image's id: a digest reference
// where there is one.
func imageRef(img storage.Image) string {
	if len(img.Digests) > 0 {
		return img.Digests[0]
	}
	return img.ID
}
