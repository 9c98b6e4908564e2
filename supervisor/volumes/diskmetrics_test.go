package volumes

import (
	"errors"
	"strings"
	"testing"

	"k8s.io/component-base/metrics"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/storage"
)

// TestDiskMetrics: what was seen is shown, with why nothing newer is; of no vCenter
// there is nothing.
func TestDiskMetrics(t *testing.T) {
	c := newDiskCollector()
	registry := metrics.NewKubeRegistry()
	registry.CustomMustRegister(c)
	gather := func() map[string]string {
		t.Helper()
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		out := map[string]string{}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				out[f.GetName()] += m.String() + "\n"
			}
		}
		return out
	}
	check := func(what string, want map[string][]string) {
		t.Helper()
		got := gather()
		for name, texts := range want {
			for _, text := range texts {
				if !strings.Contains(got[name], text) {
					t.Errorf("%s: %s is %s, want %s in it", what, name, got[name], text)
				}
			}
		}
		if len(got) != len(want) {
			t.Errorf("%s: %v", what, got)
		}
	}
	check("no vCenter", nil)
	c.ask("vc.example.com", errors.New("no answer"))
	check("not seen yet", map[string][]string{v1alpha1.MetricDatastore: {"no answer", "gauge:{value:0}"}})
	item := storage.Item{Used: 1024, Volume: storage.Volume{
		ID: "disk-1", Name: "pvc-u1", Bytes: 4096, Policy: "gold", Datastore: "vsan", Format: storage.FormatVMDK, Labels: map[string]string{storage.LabelPVC: "data", storage.LabelNamespace: "shop"},
	}}
	c.show("vc.example.com", "uuid-1", []storage.Item{item, {Used: -1, Unfinished: "it is deleted", Volume: storage.Volume{ID: "disk-2"}}})
	c.ask("vc.example.com", nil)
	want := map[string][]string{
		v1alpha1.MetricDisk:      {`"disk-1"`, `"gold"`, `"vsan"`, `"data"`, `"shop"`, `"it is deleted"`},
		v1alpha1.MetricDiskSize:  {"4096"},
		v1alpha1.MetricDiskUsed:  {"1024"},
		v1alpha1.MetricDatastore: {"vc.example.com", "uuid-1", "gauge:{value:1}"},
		v1alpha1.MetricDisksAge:  {"gauge"},
	}
	check("seen", want)
	c.ask("vc.example.com", errors.New("no answer"))
	want[v1alpha1.MetricDatastore] = []string{"no answer", "gauge:{value:0}"}
	check("silent since", want)
	if used := gather()[v1alpha1.MetricDiskUsed]; strings.Contains(used, "disk-2") {
		t.Errorf("what is not known is shown: %s", used)
	}
	c.forget()
	check("none is served any more", nil)
}
