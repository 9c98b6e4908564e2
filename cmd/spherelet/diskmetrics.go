package main

import (
	"context"
	"maps"
	"strconv"
	"sync"
	"time"

	"k8s.io/component-base/metrics"
	"k8s.io/component-base/metrics/legacyregistry"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/storage"
)

const (
	// inventoryGood is for how long an inventory is shown, so that many who ask
	// cost one look at the datastores.
	inventoryGood = 3 * time.Second
	// inventoryWait bounds how long one who asks waits for it: a file system that
	// hangs must not take the node's other metrics with it.
	inventoryWait = 2 * time.Second
)

// A diskCollector shows the node's volumes among the kubelet's metrics, which
// is where `atoll get disks` reads them.
type diskCollector struct {
	metrics.BaseStableCollector
	inventory storage.Inventory

	// changed gets a word when volumes comply otherwise than when they were last
	// looked at.
	changed chan struct{}

	mu     sync.Mutex
	last   snapshot
	asking chan struct{} // closed when an answer is there; nil: nobody asks

	disk, size, used, datastore, age *metrics.Desc
}

// A snapshot is an inventory at one time.
type snapshot struct {
	at         time.Time
	items      []storage.Item
	datastores []storage.DatastoreState
}

func newDiskCollector(i storage.Inventory) *diskCollector {
	desc := func(name, help string, labels []string) *metrics.Desc {
		return metrics.NewDesc(name, help, labels, nil, metrics.ALPHA, "")
	}
	return &diskCollector{
		inventory: i, changed: make(chan struct{}, 1),
		disk:      desc(v1alpha1.MetricDisk, "1 for each volume in the node's datastores, and for each file of a disk that is none's.", v1alpha1.DiskLabels()),
		size:      desc(v1alpha1.MetricDiskSize, "Size of a volume.", []string{v1alpha1.DiskID}),
		used:      desc(v1alpha1.MetricDiskUsed, "What a volume takes of its datastore.", []string{v1alpha1.DiskID}),
		datastore: desc(v1alpha1.MetricDatastore, "1 for each datastore of the node that is there, else 0, and why.", []string{v1alpha1.DatastoreName, v1alpha1.DatastoreID, v1alpha1.DatastoreProblem}),
		age:       desc(v1alpha1.MetricDisksAge, "Seconds since the datastores were looked at.", nil),
	}
}

// registerDiskMetrics is called once a process. The channel gets a word when
// somebody who looked at the metrics found volumes to comply otherwise.
func registerDiskMetrics(disks storage.Disks) <-chan struct{} {
	i, ok := disks.(storage.Inventory)
	if !ok {
		return nil
	}
	c := newDiskCollector(i)
	legacyregistry.CustomMustRegister(c)
	return c.changed
}

func (c *diskCollector) DescribeWithStability(ch chan<- *metrics.Desc) {
	for _, d := range []*metrics.Desc{c.disk, c.size, c.used, c.datastore, c.age} {
		ch <- d
	}
}

func (c *diskCollector) CollectWithStability(ch chan<- metrics.Metric) {
	s := c.look()
	if s.at.IsZero() {
		return
	}
	gauge := func(d *metrics.Desc, v float64, labels ...string) {
		ch <- metrics.NewLazyConstMetric(d, metrics.GaugeValue, v, labels...)
	}
	gauge(c.age, time.Since(s.at).Seconds())
	for _, d := range s.datastores {
		up := 1.0
		if d.Problem != "" {
			up = 0
		}
		gauge(c.datastore, up, d.Name, d.ID, d.Problem)
	}
	for _, i := range s.items {
		values := diskLabels(i)
		gauge(c.disk, 1, values...)
		if i.Bytes > 0 {
			gauge(c.size, float64(i.Bytes), values[0])
		}
		if i.Used >= 0 {
			gauge(c.used, float64(i.Used), values[0])
		}
	}
}

// diskLabels are the values of v1alpha1.DiskLabels.
func diskLabels(i storage.Item) []string {
	id, kind := i.ID, "volume"
	if id == "" {
		id, kind = i.Datastore+":"+i.File, "file"
	}
	var holder storage.Holder
	if i.Holder != nil {
		holder = *i.Holder
	}
	made := ""
	if !i.CreatedAt.IsZero() {
		made = i.CreatedAt.UTC().Format(time.RFC3339)
	}
	return []string{
		id, kind, i.Name, i.Policy, i.Datastore, i.At.Datastore, i.Format, strconv.FormatBool(i.Encrypted),
		holder.VM, holder.Host, i.Damage, i.Unfinished, string(i.Compliance.State), i.Compliance.Message,
		i.Labels[storage.LabelNamespace], i.Labels[storage.LabelPVC], made,
	}
}

// look returns what there is: now, or the last that is known if the datastores
// do not answer.
func (c *diskCollector) look() snapshot {
	c.mu.Lock()
	if time.Since(c.last.at) < inventoryGood {
		defer c.mu.Unlock()
		return c.last
	}
	if c.asking == nil {
		c.asking = make(chan struct{})
		go c.ask(c.asking)
	}
	asking := c.asking
	c.mu.Unlock()
	select {
	case <-asking:
	case <-time.After(inventoryWait):
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last
}

func (c *diskCollector) ask(done chan struct{}) {
	items, datastores := c.inventory.Inventory(context.Background())
	c.mu.Lock()
	defer c.mu.Unlock()
	if !maps.Equal(compliance(c.last.items), compliance(items)) {
		select {
		case c.changed <- struct{}{}:
		default:
		}
	}
	c.last = snapshot{time.Now(), items, datastores}
	c.asking = nil
	close(done)
}

// compliance is how volumes are, by ID.
func compliance(items []storage.Item) map[string]storage.ComplianceState {
	m := map[string]storage.ComplianceState{}
	for _, i := range items {
		m[i.ID] = i.Compliance.State
	}
	return m
}
