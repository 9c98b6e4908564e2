package cri

import (
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Prometheus refuses a whole answer for one series that is there twice, or
// whose labels are not those of its descriptor: nothing else checks that.
func TestMetricsAreSeries(t *testing.T) {
	h := newFakeHost()
	s := serve(t, h, t.TempDir())
	sb := s.run(t)
	for _, name := range []string{"main", "side"} {
		s.start(t, s.create(t, sb, ctrConfig(name)))
	}
	descriptors, err := s.rt.ListMetricDescriptors(t.Context(), &runtimeapi.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string]int{}
	for _, d := range descriptors.Descriptors {
		if _, twice := keys[d.Name]; twice {
			t.Errorf("%s is described twice", d.Name)
		}
		keys[d.Name] = len(d.LabelKeys)
	}
	list, err := s.rt.ListPodSandboxMetrics(t.Context(), &runtimeapi.ListPodSandboxMetricsRequest{})
	if err != nil || len(list.PodMetrics) != 1 || len(list.PodMetrics[0].ContainerMetrics) != 2 {
		t.Fatalf("metrics %v, %v", list, err)
	}
	all := list.PodMetrics[0].Metrics
	for _, c := range list.PodMetrics[0].ContainerMetrics {
		all = append(all, c.Metrics...)
	}
	series := map[string]bool{}
	for _, m := range all {
		key := m.Name + "{" + strings.Join(m.LabelValues, ",") + "}"
		if series[key] {
			t.Errorf("%s is there twice", key)
		}
		series[key] = true
		if n, ok := keys[m.Name]; !ok || n != len(m.LabelValues) {
			t.Errorf("%s has %d labels, its descriptor %d", key, len(m.LabelValues), n)
		}
	}
	if len(all) < 2*len(containerMetrics) {
		t.Errorf("%d series of %d containers' %d metrics", len(all), 2, len(containerMetrics))
	}
}
