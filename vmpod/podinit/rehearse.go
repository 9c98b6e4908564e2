package podinit

import (
	"encoding/json"
	"log/slog"

	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// rehearse does in memory, with made-up data, what a pod's start begins with.
// How to read and write a type is worked out when one is first met: done here,
// before the guest is saved, it is done for all clones, which otherwise each do
// it with code that they have never run. Nothing of it reaches the kernel.
func rehearse() {
	raw, err := json.Marshal(rehearsalSpec())
	if err == nil {
		var s *specs.Spec
		s, _, err = compose(raw, composition{root: "/r", cgroup: "/c", shm: "/dev/shm", devices: true, productUUID: "/p",
			binds: []bind{{source: "/s", destination: "/etc/hostname", optional: true}, {source: "/s", destination: "/t", readOnly: true, recursive: true}}})
		if err == nil {
			_, err = json.Marshal(s)
		}
	}
	if err != nil {
		slog.Warn("the rehearsal of a container's making failed; clones are slower for it", "error", err)
	}
	for _, m := range rehearsalMessages(raw) {
		b, err := proto.Marshal(m)
		if err == nil {
			err = proto.Unmarshal(b, m.ProtoReflect().New().Interface())
		}
		if err != nil {
			slog.Warn("the rehearsal of a message failed; clones are slower for it", "message", m.ProtoReflect().Descriptor().Name(), "error", err)
		}
	}
}

// rehearsalSpec has all that the specs of usual containers have.
func rehearsalSpec() *specs.Spec {
	zero, some, all := 0, int64(1), uint64(1)
	caps := []string{"CAP_CHOWN"}
	return &specs.Spec{
		Version:  ociVersion,
		Process:  &specs.Process{Args: []string{"/a"}, Env: []string{"A=b"}, Cwd: "/", OOMScoreAdj: &zero, User: specs.User{AdditionalGids: []uint32{1}}, Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}, Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE"}}},
		Root:     &specs.Root{Path: "/r"},
		Hostname: "h",
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"mode=1777"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"ro"}},
		},
		Annotations: map[string]string{"a": "b"},
		Linux: &specs.Linux{
			Sysctl:     map[string]string{},
			Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}},
			Resources: &specs.LinuxResources{Unified: map[string]string{"a": "b"},
				Devices: []specs.LinuxDeviceCgroup{{Access: "rwm", Major: &some, Minor: &some}},
				Memory:  &specs.LinuxMemory{Limit: &some}, CPU: &specs.LinuxCPU{Shares: &all, Quota: &some, Period: &all}, Pids: &specs.LinuxPids{}},
			Seccomp: &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: []specs.Arch{specs.ArchX86_64},
				Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow, Args: []specs.LinuxSeccompArg{{Op: specs.OpEqualTo}}}}},
			MaskedPaths: []string{"/m"}, ReadonlyPaths: []string{"/r"},
		},
	}
}

// rehearsalMessages are what host and guest say to each other about a start.
func rehearsalMessages(spec []byte) []proto.Message {
	return []proto.Message{
		&agentapi.SetupSandboxRequest{Entropy: []byte{1}, Hostname: "h", Sysctls: map[string]string{"a": "b"}, Dns: &agentapi.DNS{Servers: []string{"s"}, Options: []string{"o"}},
			Interfaces: []*agentapi.Interface{{Name: "eth0", Addresses: []string{"a"}, Routes: []*agentapi.Route{{Destination: "d", Gateway: "g"}}}}},
		&agentapi.SetupSandboxResponse{BootId: "b"},
		&agentapi.StreamHeader{}, &agentapi.StreamReply{},
		&agentapi.AddVolumeRequest{Id: "v"}, &agentapi.AddVolumeResponse{},
		&agentapi.CreateContainerRequest{Id: "c", Spec: spec, Mounts: []*agentapi.VolumeMount{{Volume: "v", Destination: "/d"}}}, &agentapi.CreateContainerResponse{},
		&agentapi.StartProcessRequest{}, &agentapi.StartProcessResponse{Pid: 1},
		&agentapi.LogRecord{}, &agentapi.ExitRecord{}, &agentapi.AcknowledgeRequest{}, &agentapi.AcknowledgeResponse{},
		&agentapi.StatsRequest{}, &agentapi.StatsResponse{Guest: &agentapi.ContainerStats{Writable: &agentapi.FilesystemStats{}}, Networks: []*agentapi.NetworkStats{{}}},
	}
}
