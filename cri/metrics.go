package cri

import (
	"context"
	"slices"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// baseLabels are on every series, as cAdvisor has them; the kubelet adds none.
// A pod's own series have neither container nor image, and the sandbox's id.
var baseLabels = []string{"container", "id", "image", "name", "namespace", "pod"}

// A metric is one series of a container in ListPodSandboxMetrics, under
// cAdvisor's name, as the kubelet's /metrics/cadvisor expects it.
type metric struct {
	name, help string
	kind       runtimeapi.MetricType
	// labels beyond the base ones, and their values.
	labels, values []string
	of             func(*measured) uint64
}

// measured is one container with its numbers.
type measured struct {
	*agentapi.ContainerStats
	c  *container
	at time.Time
}

const (
	counter = runtimeapi.MetricType_COUNTER
	gauge   = runtimeapi.MetricType_GAUGE
)

var failureLabels = []string{"failure_type", "scope"}

var containerMetrics = []metric{
	{"container_cpu_usage_seconds_total", "Cumulative cpu time consumed in seconds.", counter, []string{"cpu"}, []string{"total"}, func(m *measured) uint64 { return m.CpuUsageNs / 1e9 }},
	{"container_memory_usage_bytes", "Current memory usage in bytes, including all memory regardless of when it was accessed.", gauge, nil, nil, func(m *measured) uint64 { return m.MemoryCurrent }},
	{"container_memory_working_set_bytes", "Current working set in bytes.", gauge, nil, nil, func(m *measured) uint64 { return m.MemoryWorkingSet }},
	{"container_memory_rss", "Size of RSS in bytes.", gauge, nil, nil, func(m *measured) uint64 { return m.MemoryRss }},
	{"container_memory_swap", "Container swap usage in bytes.", gauge, nil, nil, func(m *measured) uint64 { return m.Swap }},
	{"container_memory_failures_total", "Cumulative count of memory allocation failures.", counter, failureLabels, []string{"pgfault", "container"}, func(m *measured) uint64 { return m.PageFaults }},
	{"container_memory_failures_total", "Cumulative count of memory allocation failures.", counter, failureLabels, []string{"pgmajfault", "container"}, func(m *measured) uint64 { return m.MajorPageFaults }},
	{"container_oom_events_total", "Count of out of memory events observed for the container.", counter, nil, nil, func(m *measured) uint64 { return m.OomKills }},
	{"container_processes", "Number of processes running inside the container.", gauge, nil, nil, func(m *measured) uint64 { return m.Pids }},
	{"container_fs_usage_bytes", "Number of bytes that are consumed by the container on this filesystem.", gauge, []string{"device"}, []string{ephemeralDiskID}, func(m *measured) uint64 { return m.GetWritable().GetUsedBytes() }},
	{"container_fs_limit_bytes", "Number of bytes that can be consumed by the container on this filesystem.", gauge, []string{"device"}, []string{ephemeralDiskID}, func(m *measured) uint64 { return m.GetWritable().GetCapacityBytes() }},
	{"container_fs_inodes_total", "Number of Inodes", gauge, []string{"device"}, []string{ephemeralDiskID}, func(m *measured) uint64 { return m.GetWritable().GetInodes() }},
	{"container_fs_inodes_free", "Number of available Inodes", gauge, []string{"device"}, []string{ephemeralDiskID}, func(m *measured) uint64 { return m.GetWritable().GetInodesFree() }},
	{"container_spec_memory_limit_bytes", "Memory limit for the container.", gauge, nil, nil, func(m *measured) uint64 { return limitOf(m.MemoryLimit) }},
	{"container_spec_cpu_period", "CPU period of the container.", gauge, nil, nil, func(m *measured) uint64 { return uint64(max(m.c.Resources.GetCpuPeriod(), 0)) }},
	{"container_spec_cpu_quota", "CPU quota of the container.", gauge, nil, nil, func(m *measured) uint64 { return uint64(max(m.c.Resources.GetCpuQuota(), 0)) }},
	{"container_spec_cpu_shares", "CPU share of the container.", gauge, nil, nil, func(m *measured) uint64 { return uint64(max(m.c.Resources.GetCpuShares(), 0)) }},
	{"container_start_time_seconds", "Start time of the container since unix epoch in seconds.", gauge, nil, nil, func(m *measured) uint64 { return uint64(max(m.c.StartedAt.Unix(), 0)) }},
	{"container_last_seen", "Last time a container was seen by the exporter", gauge, nil, nil, func(m *measured) uint64 { return uint64(m.at.Unix()) }},
}

// limitOf makes 0, which is no limit, of the kernel's "max".
func limitOf(bytes uint64) uint64 {
	if bytes >= 1<<62 {
		return 0
	}
	return bytes
}

// netMetrics are a pod's, one series an interface.
var netMetrics = []struct {
	name, help string
	of         func(*agentapi.NetworkStats) uint64
}{
	{"container_network_receive_bytes_total", "Cumulative count of bytes received.", func(n *agentapi.NetworkStats) uint64 { return n.RxBytes }},
	{"container_network_receive_packets_total", "Cumulative count of packets received.", func(n *agentapi.NetworkStats) uint64 { return n.RxPackets }},
	{"container_network_receive_errors_total", "Cumulative count of errors encountered while receiving.", func(n *agentapi.NetworkStats) uint64 { return n.RxErrors }},
	{"container_network_transmit_bytes_total", "Cumulative count of bytes transmitted.", func(n *agentapi.NetworkStats) uint64 { return n.TxBytes }},
	{"container_network_transmit_packets_total", "Cumulative count of packets transmitted.", func(n *agentapi.NetworkStats) uint64 { return n.TxPackets }},
	{"container_network_transmit_errors_total", "Cumulative count of errors encountered while transmitting.", func(n *agentapi.NetworkStats) uint64 { return n.TxErrors }},
}

// ListMetricDescriptors names the metrics that ListPodSandboxMetrics has.
func (r *runtimeService) ListMetricDescriptors(context.Context, *runtimeapi.ListMetricDescriptorsRequest) (*runtimeapi.ListMetricDescriptorsResponse, error) {
	resp := &runtimeapi.ListMetricDescriptorsResponse{}
	seen := map[string]bool{}
	add := func(name, help string, labels ...string) {
		if !seen[name] { // series of one name share a descriptor
			seen[name] = true
			resp.Descriptors = append(resp.Descriptors, &runtimeapi.MetricDescriptor{Name: name, Help: help, LabelKeys: slices.Concat(baseLabels, labels)})
		}
	}
	for _, m := range containerMetrics {
		add(m.name, m.help, m.labels...)
	}
	for _, m := range netMetrics {
		add(m.name, m.help, "interface")
	}
	return resp, nil
}

// ListPodSandboxMetrics reports the metrics of all ready sandboxes.
func (r *runtimeService) ListPodSandboxMetrics(ctx context.Context, _ *runtimeapi.ListPodSandboxMetricsRequest) (*runtimeapi.ListPodSandboxMetricsResponse, error) {
	return &runtimeapi.ListPodSandboxMetricsResponse{PodMetrics: r.listMetrics(ctx)}, nil
}

// StreamPodSandboxMetrics is ListPodSandboxMetrics in parts.
func (r *runtimeService) StreamPodSandboxMetrics(_ *runtimeapi.StreamPodSandboxMetricsRequest, stream runtimeapi.RuntimeService_StreamPodSandboxMetricsServer) error {
	return inParts(r.listMetrics(stream.Context()), func(items []*runtimeapi.PodSandboxMetrics) error {
		return stream.Send(&runtimeapi.StreamPodSandboxMetricsResponse{PodSandboxMetrics: items})
	})
}

func (s *Server) listMetrics(ctx context.Context) []*runtimeapi.PodSandboxMetrics {
	var out []*runtimeapi.PodSandboxMetrics
	for _, rd := range s.readings(ctx, func(*sandbox) bool { return true }) {
		at, pod := rd.at.UnixNano(), rd.sb.Config.GetMetadata()
		pm := &runtimeapi.PodSandboxMetrics{PodSandboxId: rd.sb.ID}
		for _, n := range guestNetworks(rd.guest.GetNetworks()) {
			labels := []string{"", rd.sb.ID, "", rd.sb.ID, pod.GetNamespace(), pod.GetName(), n.Name}
			for _, m := range netMetrics {
				pm.Metrics = append(pm.Metrics, &runtimeapi.Metric{Name: m.name, Timestamp: at, MetricType: counter, LabelValues: labels, Value: value(m.of(n))})
			}
		}
		for _, c := range s.store.containersOf(rd.sb.ID) {
			g := rd.container(c.ID)
			if g == nil || c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
				continue
			}
			image := firstOf(c.Config.GetImage().GetUserSpecifiedImage(), c.Config.GetImage().GetImage())
			labels := []string{c.Config.GetMetadata().GetName(), c.ID, image, c.ID, pod.GetNamespace(), pod.GetName()}
			cm := &runtimeapi.ContainerMetrics{ContainerId: c.ID}
			for _, m := range containerMetrics {
				cm.Metrics = append(cm.Metrics, &runtimeapi.Metric{Name: m.name, Timestamp: at, MetricType: m.kind,
					LabelValues: slices.Concat(labels, m.values), Value: value(m.of(&measured{g, c, rd.at}))})
			}
			pm.ContainerMetrics = append(pm.ContainerMetrics, cm)
		}
		out = append(out, pm)
	}
	return out
}
