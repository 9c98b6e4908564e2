package cri

import (
	"context"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// A metric is one series of ListPodSandboxMetrics, under cAdvisor's name, as
// the kubelet's /metrics/cadvisor expects it. Labels that name the container
// and pod are added by the kubelet.
type metric struct {
	name, help string
	kind       runtimeapi.MetricType
	labels     []string
	// of yields (label values, value) pairs for a container; nil for a pod's.
	of func(*agentapi.ContainerStats) uint64
}

var containerMetrics = []metric{
	{"container_cpu_usage_seconds_total", "Cumulative cpu time consumed in seconds.", runtimeapi.MetricType_COUNTER, []string{"cpu"}, func(c *agentapi.ContainerStats) uint64 { return c.CpuUsageNs / 1e9 }},
	{"container_memory_usage_bytes", "Current memory usage in bytes, including all memory regardless of when it was accessed.", runtimeapi.MetricType_GAUGE, nil, func(c *agentapi.ContainerStats) uint64 { return c.MemoryCurrent }},
	{"container_memory_working_set_bytes", "Current working set in bytes.", runtimeapi.MetricType_GAUGE, nil, func(c *agentapi.ContainerStats) uint64 { return c.MemoryWorkingSet }},
	{"container_memory_rss", "Size of RSS in bytes.", runtimeapi.MetricType_GAUGE, nil, func(c *agentapi.ContainerStats) uint64 { return c.MemoryRss }},
	{"container_memory_swap", "Container swap usage in bytes.", runtimeapi.MetricType_GAUGE, nil, func(c *agentapi.ContainerStats) uint64 { return c.Swap }},
	{"container_spec_memory_limit_bytes", "Memory limit for the container.", runtimeapi.MetricType_GAUGE, nil, func(c *agentapi.ContainerStats) uint64 { return c.MemoryLimit }},
	{"container_processes", "Number of processes running inside the container.", runtimeapi.MetricType_GAUGE, nil, func(c *agentapi.ContainerStats) uint64 { return c.Pids }},
	{"container_oom_events_total", "Count of out of memory events observed for the container.", runtimeapi.MetricType_COUNTER, nil, func(c *agentapi.ContainerStats) uint64 { return c.OomKills }},
	{"container_fs_usage_bytes", "Number of bytes that are consumed by the container on this filesystem.", runtimeapi.MetricType_GAUGE, []string{"device"}, func(c *agentapi.ContainerStats) uint64 { return c.GetWritable().GetUsedBytes() }},
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
	for _, m := range containerMetrics {
		resp.Descriptors = append(resp.Descriptors, &runtimeapi.MetricDescriptor{Name: m.name, Help: m.help, LabelKeys: m.labels})
	}
	for _, m := range netMetrics {
		resp.Descriptors = append(resp.Descriptors, &runtimeapi.MetricDescriptor{Name: m.name, Help: m.help, LabelKeys: []string{"interface"}})
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
		at := rd.at.UnixNano()
		pm := &runtimeapi.PodSandboxMetrics{PodSandboxId: rd.sb.ID}
		for _, n := range rd.guest.GetNetworks() {
			for _, m := range netMetrics {
				pm.Metrics = append(pm.Metrics, &runtimeapi.Metric{Name: m.name, Timestamp: at, MetricType: runtimeapi.MetricType_COUNTER, LabelValues: []string{n.Name}, Value: value(m.of(n))})
			}
		}
		for _, c := range s.store.containersOf(rd.sb.ID) {
			g := rd.container(c.ID)
			if g == nil || c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
				continue
			}
			cm := &runtimeapi.ContainerMetrics{ContainerId: c.ID}
			for _, m := range containerMetrics {
				labels := make([]string, len(m.labels))
				if len(m.labels) == 1 && m.labels[0] == "cpu" {
					labels[0] = "total"
				}
				cm.Metrics = append(cm.Metrics, &runtimeapi.Metric{Name: m.name, Timestamp: at, MetricType: m.kind, LabelValues: labels, Value: value(m.of(g))})
			}
			pm.ContainerMetrics = append(pm.ContainerMetrics, cm)
		}
		out = append(out, pm)
	}
	return out
}
