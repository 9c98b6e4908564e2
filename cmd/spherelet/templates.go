package main

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/component-base/metrics"
	"k8s.io/component-base/metrics/legacyregistry"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/spherelet/resources"
	"github.com/openatoll/atoll/vmpod/qemu"
)

// templates are made for two sizes before anybody asks: that of a pod of one
// container that says nothing, and the smallest that there is, from which all
// between the two are grown.
func templates(c *v1alpha1.SphereletConfiguration) (qemu.Templates, error) {
	t := c.Templates
	budget, err := resource.ParseQuantity(t.Memory)
	if err != nil {
		return qemu.Templates{}, err
	}
	usual := resources.ForPod(&v1.Pod{Spec: v1.PodSpec{Containers: make([]v1.Container, 1)}}, resources.Policy{})
	small := resources.ForPod(&v1.Pod{}, resources.Policy{})
	return qemu.Templates{
		Enabled: t.Enabled == nil || *t.Enabled, PerTenant: t.PerTenant, Memory: budget.Value(), Warm: int(t.Warm), Furnished: true,
		Sizes: []qemu.Size{{CPUs: usual.CPUs, Memory: usual.Memory}, {CPUs: small.CPUs, Memory: small.Memory}},
	}, nil
}

// templateInfo is what "crictl info" says of templates.
func templateInfo(d *qemu.Driver) string {
	all, off := d.TemplateStatus()
	if off != "" {
		return "none: " + off
	}
	var text []string
	for _, t := range all {
		text = append(text, strings.TrimSpace(fmt.Sprintf("%d CPU %d MiB %s %s", t.CPUs, t.Memory>>20, t.State, t.Error)))
	}
	slices.Sort(text)
	return strings.Join(text, "; ")
}

// A launchCollector shows the driver's counts among the kubelet's metrics.
type launchCollector struct {
	metrics.BaseStableCollector
	driver atomic.Pointer[qemu.Driver] // nil before there is one

	launches, templates, bytes *metrics.Desc
}

var launchMetrics = &launchCollector{
	launches: metrics.NewDesc("atoll_vm_launches_total",
		"Pod VMs launched, by kind (clone, warm, which is a clone that had been waiting, or cold, which is a boot) and by why it was a boot.",
		[]string{"kind", "reason"}, nil, metrics.ALPHA, ""),
	templates: metrics.NewDesc("atoll_vm_templates",
		"Templates of pod VMs, by state (Wanted, Making, Ready or Failed).", []string{"state"}, nil, metrics.ALPHA, ""),
	bytes: metrics.NewDesc("atoll_vm_templates_bytes",
		"Memory of the host that the templates of pod VMs take.", nil, nil, metrics.ALPHA, ""),
}

func (c *launchCollector) DescribeWithStability(ch chan<- *metrics.Desc) {
	ch <- c.launches
	ch <- c.templates
	ch <- c.bytes
}

func (c *launchCollector) CollectWithStability(ch chan<- metrics.Metric) {
	d := c.driver.Load()
	if d == nil {
		return
	}
	for _, l := range d.Launches() {
		ch <- metrics.NewLazyConstMetric(c.launches, metrics.CounterValue, float64(l.Count), l.Kind, l.Reason)
	}
	states, bytes := map[string]int{}, int64(0)
	all, _ := d.TemplateStatus()
	for _, t := range all {
		states[t.State]++
		bytes += t.Bytes
	}
	for state, n := range states {
		ch <- metrics.NewLazyConstMetric(c.templates, metrics.GaugeValue, float64(n), state)
	}
	ch <- metrics.NewLazyConstMetric(c.bytes, metrics.GaugeValue, float64(bytes))
}

// registerLaunchMetrics is called once a process.
func registerLaunchMetrics() { legacyregistry.CustomMustRegister(launchMetrics) }
