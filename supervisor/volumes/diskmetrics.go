package volumes

import (
	"strconv"
	"sync"
	"time"

	"k8s.io/component-base/metrics"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/storage"
)

// A diskCollector shows what the last survey has seen in vCenter, by the metrics
// with which nodes show their volumes: `atoll get disks` reads them. To ask for them
// costs vCenter nothing.
type diskCollector struct {
	metrics.BaseStableCollector

	mu sync.Mutex
	// vcenter is the address of the one that is served, uuid its instance's; both
	// are empty while none is.
	vcenter, uuid string
	items         []storage.Item
	at            time.Time // when that was so
	problem       string    // why nothing newer is known

	disk, size, used, datastore, age *metrics.Desc
}

// shownDisks is the process' one.
var shownDisks = newDiskCollector()

func newDiskCollector() *diskCollector {
	desc := func(name, help string, labels ...string) *metrics.Desc {
		return metrics.NewDesc(name, help, labels, nil, metrics.ALPHA, "")
	}
	return &diskCollector{
		disk:      desc(v1alpha1.MetricDisk, "1 for each volume in vCenter that bears the cluster's mark.", v1alpha1.DiskLabels()...),
		size:      desc(v1alpha1.MetricDiskSize, "Size of a volume.", v1alpha1.DiskID),
		used:      desc(v1alpha1.MetricDiskUsed, "What a volume and its snapshots take of their datastore.", v1alpha1.DiskID),
		datastore: desc(v1alpha1.MetricDatastore, "1 for the vCenter if it has answered, else 0, and why.", v1alpha1.DatastoreName, v1alpha1.DatastoreID, v1alpha1.DatastoreProblem),
		age:       desc(v1alpha1.MetricDisksAge, "Seconds since vCenter was asked."),
	}
}

func (c *diskCollector) show(vcenter, uuid string, items []storage.Item) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.vcenter, c.uuid, c.items, c.at = vcenter, uuid, items, time.Now()
}

// ask says how it went to ask a vCenter.
func (c *diskCollector) ask(vcenter string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.vcenter, c.problem = vcenter, ""
	if err != nil {
		c.problem = err.Error()
	}
}

// forget what no vCenter says any more.
func (c *diskCollector) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.vcenter, c.uuid, c.items, c.at, c.problem = "", "", nil, time.Time{}, ""
}

// DescribeWithStability implements metrics.StableCollector.
func (c *diskCollector) DescribeWithStability(ch chan<- *metrics.Desc) {
	for _, d := range []*metrics.Desc{c.disk, c.size, c.used, c.datastore, c.age} {
		ch <- d
	}
}

// CollectWithStability implements metrics.StableCollector.
func (c *diskCollector) CollectWithStability(ch chan<- metrics.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	gauge := func(d *metrics.Desc, v float64, labels ...string) {
		ch <- metrics.NewLazyConstMetric(d, metrics.GaugeValue, v, labels...)
	}
	if c.vcenter == "" {
		return
	}
	up := 1.0
	if c.problem != "" {
		up = 0
	}
	gauge(c.datastore, up, c.vcenter, c.uuid, c.problem)
	if c.at.IsZero() {
		return
	}
	gauge(c.age, time.Since(c.at).Seconds())
	for _, i := range c.items {
		values := diskLabels(i)
		gauge(c.disk, 1, values...)
		gauge(c.size, float64(i.Bytes), values[0])
		if i.Used >= 0 {
			gauge(c.used, float64(i.Used), values[0])
		}
	}
}

// diskLabels are the values of v1alpha1.DiskLabels. Whether a volume is kept as its
// policy says is on its claim.
func diskLabels(i storage.Item) []string {
	var holder storage.Holder
	if i.Holder != nil {
		holder = *i.Holder
	}
	return []string{
		i.ID, "volume", i.Name, i.Policy, i.Datastore, i.At.Datastore, i.Format, strconv.FormatBool(i.Encrypted),
		holder.VM, holder.Host, "", i.Unfinished, "", "",
		i.Labels[storage.LabelNamespace], i.Labels[storage.LabelPVC], i.CreatedAt.UTC().Format(time.RFC3339),
	}
}
