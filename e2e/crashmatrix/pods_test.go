package crashmatrix

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
)

// A pod is one that the test asks for, and what it was told about it.
type pod struct {
	config  *runtimeapi.PodSandboxConfig
	sandbox string // its ID
}

func (n *node) newPod(uid string) *pod {
	return &pod{config: &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: uid, Namespace: "matrix", Uid: uid},
		Hostname:     uid,
		LogDirectory: filepath.Join(n.dir, "logs", uid),
		Labels:       map[string]string{"io.kubernetes.pod.uid": uid},
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
		}},
	}}
}

func (p *pod) uid() string { return p.config.Metadata.Uid }
func (p *pod) key() string { return vmpod.ID{PodUID: p.uid()}.String() }

// podMemory is what a pod gets that says nothing, in bytes: the node has a
// template of that size.
const podMemory = 701 << 20

func (p *pod) hint(images ...string) *vmpod.Hint {
	return &vmpod.Hint{
		Owner: vmpod.Owner{PodUID: p.uid(), Namespace: "matrix", Name: p.uid()},
		CPUs:  1, Memory: podMemory, EphemeralBytes: 64 << 20, Images: images,
	}
}

func (p *pod) logFile(c *runtimeapi.ContainerConfig) string {
	return filepath.Join(p.config.LogDirectory, c.LogPath)
}

// container describes one that runs a script. It has what a container can
// have on the host: a volume, a secret in its environment, a log.
func (n *node) container(p *pod, name, image, script string) (*runtimeapi.ContainerConfig, error) {
	volume := filepath.Join(n.kubelet(), "pods", p.uid(), "volumes/kubernetes.io~configmap", name)
	if err := os.MkdirAll(volume, 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(volume, "key"), []byte("value of "+name), 0o644); err != nil {
		return nil, err
	}
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: image},
		LogPath:  name + ".log",
		Command:  []string{"sh", "-c", script},
		Envs:     []*runtimeapi.KeyValue{{Key: "PASSWORD", Value: []byte("secret")}},
		Mounts:   []*runtimeapi.Mount{{ContainerPath: "/etc/volume", HostPath: volume, Readonly: true}},
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
		}},
	}, nil
}

// accelerator is what the pods' VMs run on.
func (n *node) accelerator(ctx context.Context) (string, error) {
	r, err := n.rt.Status(ctx, &runtimeapi.StatusRequest{Verbose: true})
	if err != nil {
		return "", err
	}
	var view struct{ Host struct{ Accelerator string } }
	err = json.Unmarshal([]byte(r.Info["config"]), &view)
	return view.Host.Accelerator, err
}

func (n *node) pull(ctx context.Context, ref string) error {
	_, err := n.img.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	return err
}

func (n *node) runPod(ctx context.Context, p *pod) error {
	r, err := n.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p.config})
	if err == nil {
		p.sandbox = r.PodSandboxId
	}
	return err
}

func (n *node) create(ctx context.Context, p *pod, c *runtimeapi.ContainerConfig) (string, error) {
	r, err := n.rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.sandbox, Config: c, SandboxConfig: p.config})
	return r.GetContainerId(), err
}

func (n *node) startContainer(ctx context.Context, id string) error {
	_, err := n.rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
	return err
}

func (n *node) status(ctx context.Context, id string) (*runtimeapi.ContainerStatus, error) {
	r, err := n.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	return r.GetStatus(), err
}

func (n *node) stopPod(ctx context.Context, p *pod) error {
	_, err := n.rt.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox})
	return err
}

func (n *node) removePod(ctx context.Context, p *pod) error {
	_, err := n.rt.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.sandbox})
	return err
}

func (n *node) removeImage(ctx context.Context, ref string) error {
	_, err := n.img.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	return err
}

// A view is what the daemon says it has.
type view struct {
	sandboxes  []*runtimeapi.PodSandbox
	containers []*runtimeapi.Container
	images     []*runtimeapi.Image
}

func (n *node) look(ctx context.Context) (v view, err error) {
	s, err := n.rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return v, err
	}
	c, err := n.rt.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return v, err
	}
	i, err := n.img.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	return view{s.GetItems(), c.GetContainers(), i.GetImages()}, err
}

// ready maps the keys of all sandboxes to whether they are ready.
func (v view) ready() map[string]bool {
	m := map[string]bool{}
	for _, s := range v.sandboxes {
		m[fmt.Sprintf("%s_%d", s.Metadata.Uid, s.Metadata.Attempt)] = s.State == runtimeapi.PodSandboxState_SANDBOX_READY
	}
	return m
}

func (v view) sandboxOf(uid string) *runtimeapi.PodSandbox {
	for _, s := range v.sandboxes {
		if s.Metadata.Uid == uid {
			return s
		}
	}
	return nil
}

func (v view) container(id string) *runtimeapi.Container {
	for _, c := range v.containers {
		if c.Id == id {
			return c
		}
	}
	return nil
}
