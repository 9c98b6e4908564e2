package cri

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// cpuSamples remembers the last reading of each CPU counter, to make rates of
// them. A rate is kept for readings that follow each other too fast.
type cpuSamples struct {
	mu   sync.Mutex
	last map[string]cpuSample
}

type cpuSample struct {
	at    time.Time
	usage uint64 // ns
	rate  uint64 // nano-cores, valid if known
	known bool
}

// minInterval is the shortest time over which a rate means something.
const minInterval = 500 * time.Millisecond

func newCPUSamples() *cpuSamples { return &cpuSamples{last: map[string]cpuSample{}} }

// rate returns the use in nano-cores since the last reading of key; ok is
// false as long as there is only one.
func (s *cpuSamples) rate(key string, at time.Time, usage uint64) (rate uint64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, have := s.last[key]
	if have && at.Sub(old.at) < minInterval {
		return old.rate, old.known
	}
	now := cpuSample{at: at, usage: usage}
	if have && usage >= old.usage {
		now.rate = uint64(float64(usage-old.usage) / at.Sub(old.at).Seconds())
		now.known = true
	}
	s.last[key] = now
	return now.rate, now.known
}

func (s *cpuSamples) forget(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.last, key)
}

// ContainerStats reports one container that runs.
func (r *runtimeService) ContainerStats(ctx context.Context, req *runtimeapi.ContainerStatsRequest) (*runtimeapi.ContainerStatsResponse, error) {
	c, p, err := r.runningContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	sb, ok := r.store.sandbox(p.id)
	if !ok {
		return nil, fmt.Errorf("sandbox %s: %w", p.id, errdefs.ErrNotFound)
	}
	rd, err := r.read(ctx, sb, askGuest)
	if err != nil {
		return nil, err
	}
	st := r.containerStats(rd, c)
	if st == nil {
		return nil, fmt.Errorf("container %s has no numbers in its guest: %w", c.ID, errdefs.ErrNotFound)
	}
	return &runtimeapi.ContainerStatsResponse{Stats: st}, nil
}

// ListContainerStats reports the containers that run.
func (r *runtimeService) ListContainerStats(ctx context.Context, req *runtimeapi.ListContainerStatsRequest) (*runtimeapi.ListContainerStatsResponse, error) {
	return &runtimeapi.ListContainerStatsResponse{Stats: r.listContainerStats(ctx, req.GetFilter())}, nil
}

// StreamContainerStats is ListContainerStats in parts.
func (r *runtimeService) StreamContainerStats(req *runtimeapi.StreamContainerStatsRequest, stream runtimeapi.RuntimeService_StreamContainerStatsServer) error {
	return inParts(r.listContainerStats(stream.Context(), req.GetFilter()), func(items []*runtimeapi.ContainerStats) error {
		return stream.Send(&runtimeapi.StreamContainerStatsResponse{ContainerStats: items})
	})
}

func (s *Server) listContainerStats(ctx context.Context, f *runtimeapi.ContainerStatsFilter) []*runtimeapi.ContainerStats {
	wanted := func(c *container) bool {
		return (f.GetId() == "" || strings.HasPrefix(c.ID, f.Id)) && hasLabels(c.Config.GetLabels(), f.GetLabelSelector())
	}
	rds := s.readings(ctx, func(sb *sandbox) bool {
		if f.GetPodSandboxId() != "" && !strings.HasPrefix(sb.ID, f.PodSandboxId) {
			return false
		}
		for _, c := range s.store.containersOf(sb.ID) {
			if wanted(c) {
				return true
			}
		}
		return false
	})
	var out []*runtimeapi.ContainerStats
	for _, rd := range rds {
		for _, c := range s.store.containersOf(rd.sb.ID) {
			if !wanted(c) || c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
				continue
			}
			if st := s.containerStats(rd, c); st != nil {
				out = append(out, st)
			}
		}
	}
	return out
}

func (s *Server) containerStats(rd *reading, c *container) *runtimeapi.ContainerStats {
	g := rd.container(c.ID)
	if g == nil {
		return nil
	}
	st := &runtimeapi.ContainerStats{
		Attributes: &runtimeapi.ContainerAttributes{Id: c.ID, Metadata: c.Config.GetMetadata(), Labels: c.Config.GetLabels(), Annotations: c.Config.GetAnnotations()},
		Cpu:        s.cpuUsage(c.ID, rd.at, g.CpuUsageNs),
		Memory:     memoryUsage(rd.at, g, g.MemoryLimit),
		Swap:       &runtimeapi.SwapUsage{Timestamp: rd.at.UnixNano(), SwapUsageBytes: value(g.Swap)},
	}
	if w := g.GetWritable(); w != nil {
		st.WritableLayer = &runtimeapi.FilesystemUsage{
			Timestamp: rd.at.UnixNano(), FsId: &runtimeapi.FilesystemIdentifier{Mountpoint: s.containerFS()},
			UsedBytes: value(w.UsedBytes), InodesUsed: value(w.UsedInodes),
		}
	}
	return st
}

// containerFS names the file system that the pods' writable disks lie on, as
// ImageFsInfo does.
func (s *Server) containerFS() string {
	s.fsMu.Lock()
	defer s.fsMu.Unlock()
	if s.fsPath != "" {
		return s.fsPath
	}
	ctx, cancel := context.WithTimeout(s.ctx, 10*time.Second)
	defer cancel()
	images, err := s.config.Images.Usage(ctx)
	if err != nil {
		return ""
	}
	if disks, err := s.ephemeralUsage(ctx, images.Path); err == nil {
		s.fsPath = disks.Path
	}
	return s.fsPath
}

func (s *Server) cpuUsage(key string, at time.Time, ns uint64) *runtimeapi.CpuUsage {
	u := &runtimeapi.CpuUsage{Timestamp: at.UnixNano(), UsageCoreNanoSeconds: value(ns)}
	if rate, ok := s.samples.rate(key, at, ns); ok {
		u.UsageNanoCores = value(rate)
	}
	return u
}

func memoryUsage(at time.Time, g *agentapi.ContainerStats, limit uint64) *runtimeapi.MemoryUsage {
	m := &runtimeapi.MemoryUsage{
		Timestamp:       at.UnixNano(),
		WorkingSetBytes: value(g.MemoryWorkingSet),
		UsageBytes:      value(g.MemoryCurrent),
		RssBytes:        value(g.MemoryRss),
		PageFaults:      value(g.PageFaults),
		MajorPageFaults: value(g.MajorPageFaults),
	}
	if limit > 0 && limit < 1<<62 {
		m.AvailableBytes = value(limit - min(limit, g.MemoryWorkingSet))
	}
	return m
}

func value(v uint64) *runtimeapi.UInt64Value { return &runtimeapi.UInt64Value{Value: v} }

// PodSandboxStats reports one sandbox that is ready.
func (r *runtimeService) PodSandboxStats(ctx context.Context, req *runtimeapi.PodSandboxStatsRequest) (*runtimeapi.PodSandboxStatsResponse, error) {
	sb, err := r.findSandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	rd, err := r.read(ctx, sb, askGuest)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.PodSandboxStatsResponse{Stats: r.sandboxStats(rd)}, nil
}

// ListPodSandboxStats reports the sandboxes that are ready.
func (r *runtimeService) ListPodSandboxStats(ctx context.Context, req *runtimeapi.ListPodSandboxStatsRequest) (*runtimeapi.ListPodSandboxStatsResponse, error) {
	return &runtimeapi.ListPodSandboxStatsResponse{Stats: r.listSandboxStats(ctx, req.GetFilter())}, nil
}

// StreamPodSandboxStats is ListPodSandboxStats in parts.
func (r *runtimeService) StreamPodSandboxStats(req *runtimeapi.StreamPodSandboxStatsRequest, stream runtimeapi.RuntimeService_StreamPodSandboxStatsServer) error {
	return inParts(r.listSandboxStats(stream.Context(), req.GetFilter()), func(items []*runtimeapi.PodSandboxStats) error {
		return stream.Send(&runtimeapi.StreamPodSandboxStatsResponse{PodSandboxStats: items})
	})
}

func (s *Server) listSandboxStats(ctx context.Context, f *runtimeapi.PodSandboxStatsFilter) []*runtimeapi.PodSandboxStats {
	rds := s.readings(ctx, func(sb *sandbox) bool {
		return (f.GetId() == "" || strings.HasPrefix(sb.ID, f.Id)) && hasLabels(sb.Config.GetLabels(), f.GetLabelSelector())
	})
	var out []*runtimeapi.PodSandboxStats
	for _, rd := range rds {
		out = append(out, s.sandboxStats(rd))
	}
	return out
}

// sandboxStats tells a pod's cost: CPU is the VMM's, as the host counts it,
// where the driver can meter; memory is the guest's working set, which is what
// the pod's limits and its eviction are about; the network is the guest's. The
// memory's UsageBytes are the containers' alone: a kubelet that lowers a pod's
// limit compares the two, and the guest's own share is no part of the limit.
func (s *Server) sandboxStats(rd *reading) *runtimeapi.PodSandboxStats {
	sb := rd.sb
	linux := &runtimeapi.LinuxPodSandboxStats{
		Memory:  memoryUsage(rd.at, rd.guest.GetGuest(), rd.guest.GetMemoryTotal()),
		Network: networkUsage(rd),
		Process: &runtimeapi.ProcessUsage{Timestamp: rd.at.UnixNano()},
	}
	cpu := rd.guest.GetGuest().GetCpuUsageNs()
	if rd.cpu != nil {
		cpu = *rd.cpu
	}
	linux.Cpu = s.cpuUsage(sb.ID, rd.at, cpu)
	var pids, used uint64
	for _, c := range s.store.containersOf(sb.ID) {
		if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			continue
		}
		if st := s.containerStats(rd, c); st != nil {
			linux.Containers = append(linux.Containers, st)
			pids += rd.container(c.ID).GetPids()
			used += rd.container(c.ID).GetMemoryCurrent()
		}
	}
	linux.Memory.UsageBytes = value(used)
	linux.Process.ProcessCount = value(pids)
	return &runtimeapi.PodSandboxStats{
		Attributes: &runtimeapi.PodSandboxAttributes{Id: sb.ID, Metadata: sb.Config.GetMetadata(), Labels: sb.Config.GetLabels(), Annotations: sb.Config.GetAnnotations()},
		Linux:      linux,
	}
}

func networkUsage(rd *reading) *runtimeapi.NetworkUsage {
	n := &runtimeapi.NetworkUsage{Timestamp: rd.at.UnixNano()}
	for _, i := range guestNetworks(rd.guest.GetNetworks()) {
		u := &runtimeapi.NetworkInterfaceUsage{
			Name: i.Name, RxBytes: value(i.RxBytes), RxErrors: value(i.RxErrors), TxBytes: value(i.TxBytes), TxErrors: value(i.TxErrors),
		}
		if i.Name == "eth0" {
			n.DefaultInterface = u
		} else if i.Name != "lo" {
			n.Interfaces = append(n.Interfaces, u)
		}
	}
	return n
}

// sameFilesystem compares two directories' devices; what cannot be read counts
// as the same.
func sameFilesystem(a, b string) bool {
	var x, y syscall.Stat_t
	return syscall.Stat(a, &x) != nil || syscall.Stat(b, &y) != nil || x.Dev == y.Dev
}
