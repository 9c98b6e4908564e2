package cri

import (
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fullPod is a sandbox that uses every field that a pod VM honours.
func fullPod(dir string) *runtimeapi.PodSandboxConfig {
	c := podConfig(dir)
	c.Metadata.Uid, c.Metadata.Attempt = "fuzz-1", 3
	delete(c.Labels, kubeletUIDLabel) // so that host paths are copied in
	c.Annotations = map[string]string{"a/b": "c"}
	c.DnsConfig.Searches, c.DnsConfig.Options = []string{"default.svc.cluster.local"}, []string{"ndots:5"}
	c.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: 8080, HostIp: "127.0.0.1"}}
	c.Linux.Sysctls = map[string]string{"net.ipv4.ip_local_port_range": "1024 65535"}
	c.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 150000, MemoryLimitInBytes: 64 * mib}
	c.Linux.Overhead = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1 * mib}
	return c
}

// fullContainer is the same of a container.
func fullContainer() *runtimeapi.ContainerConfig {
	c := ctrConfig("full")
	c.Command, c.Args, c.WorkingDir = []string{"/bin/sh"}, []string{"-c", "true"}, "/tmp"
	c.Envs = []*runtimeapi.KeyValue{{Key: "A", Value: []byte("b")}}
	c.Labels, c.Annotations = map[string]string{"l": "1"}, map[string]string{"a": "1"}
	c.Mounts = []*runtimeapi.Mount{{ContainerPath: "/etc/hostname", HostPath: "/etc/hostname", Readonly: true}}
	c.StopSignal, c.Stdin, c.Tty = runtimeapi.Signal_SIGUSR1, true, true
	c.Linux.Resources = &runtimeapi.LinuxContainerResources{
		CpuShares: 2, CpuPeriod: 100000, CpuQuota: 50000, MemoryLimitInBytes: 32 * mib, OomScoreAdj: 100,
		CpusetCpus: "0", Unified: map[string]string{"memory.high": "max"},
	}
	sc := c.Linux.SecurityContext
	sc.RunAsUser, sc.RunAsGroup, sc.SupplementalGroups = &runtimeapi.Int64Value{Value: 1}, &runtimeapi.Int64Value{Value: 2}, []int64{3}
	sc.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"NET_ADMIN"}, DropCapabilities: []string{"ALL"}}
	sc.Seccomp = &runtimeapi.SecurityProfile{}
	sc.MaskedPaths, sc.ReadonlyPaths = []string{"/proc/kcore"}, []string{"/proc/sys"}
	sc.NoNewPrivs, sc.ReadonlyRootfs = true, true
	return c
}

// rpcSeeds has requests of every method: some that work, some that do not.
func rpcSeeds() map[string][]proto.Message {
	image := &runtimeapi.ImageSpec{Image: "atoll.local/web:1"}
	small := &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 8 * mib}
	return map[string][]proto.Message{
		"Version":        {&runtimeapi.VersionRequest{Version: "v1"}},
		"RunPodSandbox":  {&runtimeapi.RunPodSandboxRequest{Config: fullPod("/var/log/pods")}, &runtimeapi.RunPodSandboxRequest{}, &runtimeapi.RunPodSandboxRequest{Config: podConfig("/logs"), RuntimeHandler: "atoll"}},
		"StopPodSandbox": {&runtimeapi.StopPodSandboxRequest{PodSandboxId: aSandbox}, &runtimeapi.StopPodSandboxRequest{}},
		"RemovePodSandbox": {
			&runtimeapi.RemovePodSandboxRequest{PodSandboxId: aSandbox}, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: "none"},
		},
		"PodSandboxStatus": {&runtimeapi.PodSandboxStatusRequest{PodSandboxId: aSandbox, Verbose: true}},
		"ListPodSandbox": {&runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{
			Id: aSandbox, LabelSelector: map[string]string{"app": "web"}, State: &runtimeapi.PodSandboxStateValue{State: 1},
		}}},
		"CreateContainer": {
			&runtimeapi.CreateContainerRequest{PodSandboxId: aSandbox, Config: fullContainer(), SandboxConfig: fullPod("/")},
			&runtimeapi.CreateContainerRequest{PodSandboxId: aSandbox, Config: ctrConfig("plain")}, &runtimeapi.CreateContainerRequest{PodSandboxId: aSandbox},
		},
		"StartContainer":  {&runtimeapi.StartContainerRequest{ContainerId: aContainer}},
		"StopContainer":   {&runtimeapi.StopContainerRequest{ContainerId: aContainer, Timeout: 1 << 60}, &runtimeapi.StopContainerRequest{ContainerId: aContainer, Timeout: -1}},
		"RemoveContainer": {&runtimeapi.RemoveContainerRequest{ContainerId: aContainer}},
		"ListContainers":  {&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: aSandbox, State: &runtimeapi.ContainerStateValue{State: 7}}}},
		"ContainerStatus": {&runtimeapi.ContainerStatusRequest{ContainerId: aContainer, Verbose: true}},
		"UpdateContainerResources": {
			&runtimeapi.UpdateContainerResourcesRequest{ContainerId: aContainer, Linux: small},
			&runtimeapi.UpdateContainerResourcesRequest{ContainerId: aContainer, Windows: &runtimeapi.WindowsContainerResources{}},
		},
		"ReopenContainerLog":        {&runtimeapi.ReopenContainerLogRequest{ContainerId: aContainer}},
		"ExecSync":                  {&runtimeapi.ExecSyncRequest{ContainerId: aContainer, Cmd: []string{"echo", "a"}, Timeout: 1 << 62}, &runtimeapi.ExecSyncRequest{ContainerId: aContainer, Cmd: []string{"exit", "3"}}, &runtimeapi.ExecSyncRequest{ContainerId: aContainer}},
		"Exec":                      {&runtimeapi.ExecRequest{ContainerId: aContainer, Cmd: []string{"sh"}, Stdout: true, Stderr: true}, &runtimeapi.ExecRequest{ContainerId: aContainer, Cmd: []string{"sh"}, Tty: true, Stderr: true}},
		"Attach":                    {&runtimeapi.AttachRequest{ContainerId: aContainer, Stdout: true}},
		"PortForward":               {&runtimeapi.PortForwardRequest{PodSandboxId: aSandbox, Port: []int32{80, -1, 1 << 30}}},
		"ContainerStats":            {&runtimeapi.ContainerStatsRequest{ContainerId: aContainer}},
		"ListContainerStats":        {&runtimeapi.ListContainerStatsRequest{Filter: &runtimeapi.ContainerStatsFilter{Id: aContainer}}},
		"PodSandboxStats":           {&runtimeapi.PodSandboxStatsRequest{PodSandboxId: aSandbox}},
		"ListPodSandboxStats":       {&runtimeapi.ListPodSandboxStatsRequest{Filter: &runtimeapi.PodSandboxStatsFilter{Id: aSandbox}}},
		"UpdateRuntimeConfig":       {&runtimeapi.UpdateRuntimeConfigRequest{RuntimeConfig: &runtimeapi.RuntimeConfig{NetworkConfig: &runtimeapi.NetworkConfig{PodCidr: "198.19.0.0/24,fd00::/64"}}}},
		"Status":                    {&runtimeapi.StatusRequest{Verbose: true}},
		"CheckpointContainer":       {&runtimeapi.CheckpointContainerRequest{ContainerId: aContainer, Location: "/etc/x", Timeout: -1}},
		"ListMetricDescriptors":     {&runtimeapi.ListMetricDescriptorsRequest{}},
		"ListPodSandboxMetrics":     {&runtimeapi.ListPodSandboxMetricsRequest{}},
		"RuntimeConfig":             {&runtimeapi.RuntimeConfigRequest{}},
		"UpdatePodSandboxResources": {&runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: aSandbox, Resources: small, Overhead: small}},
		"StreamPodSandboxes":        {&runtimeapi.StreamPodSandboxesRequest{}},
		"StreamContainers":          {&runtimeapi.StreamContainersRequest{}},
		"StreamContainerStats":      {&runtimeapi.StreamContainerStatsRequest{}},
		"StreamPodSandboxStats":     {&runtimeapi.StreamPodSandboxStatsRequest{}},
		"GetContainerEvents":        {&runtimeapi.GetEventsRequest{}},
		"StreamPodSandboxMetrics":   {&runtimeapi.StreamPodSandboxMetricsRequest{}},
		"ListImages":                {&runtimeapi.ListImagesRequest{Filter: &runtimeapi.ImageFilter{Image: image}}},
		"ImageStatus":               {&runtimeapi.ImageStatusRequest{Image: image, Verbose: true}},
		"PullImage":                 {&runtimeapi.PullImageRequest{Image: image, Auth: &runtimeapi.AuthConfig{Auth: "YTpi"}, SandboxConfig: fullPod("/")}, &runtimeapi.PullImageRequest{Image: image, Auth: &runtimeapi.AuthConfig{Auth: "%"}}},
		"RemoveImage":               {&runtimeapi.RemoveImageRequest{Image: image}},
		"ImageFsInfo":               {&runtimeapi.ImageFsInfoRequest{}},
		"StreamImages":              {&runtimeapi.StreamImagesRequest{}},
	}
}
