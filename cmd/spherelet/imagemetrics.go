package main

import (
	"k8s.io/component-base/metrics"
	"k8s.io/component-base/metrics/legacyregistry"

	"github.com/openatoll/atoll/storage/image"
)

// An imageCollector shows what the image store has done among the kubelet's
// metrics.
type imageCollector struct {
	metrics.BaseStableCollector
	counts func() image.Counts

	converted, damaged *metrics.Desc
}

func newImageCollector(counts func() image.Counts) *imageCollector {
	return &imageCollector{
		counts: counts,
		converted: metrics.NewDesc("atoll_image_converted_bytes_total",
			"Bytes written to make disks of images. A second pod of an image adds none.", nil, nil, metrics.ALPHA, ""),
		damaged: metrics.NewDesc("atoll_image_damaged_total",
			"Parts of images' disks that were found damaged, by part (layer or metadata).", []string{"part"}, nil, metrics.ALPHA, ""),
	}
}

func (c *imageCollector) DescribeWithStability(ch chan<- *metrics.Desc) {
	ch <- c.converted
	ch <- c.damaged
}

func (c *imageCollector) CollectWithStability(ch chan<- metrics.Metric) {
	n := c.counts()
	ch <- metrics.NewLazyConstMetric(c.converted, metrics.CounterValue, float64(n.Converted))
	ch <- metrics.NewLazyConstMetric(c.damaged, metrics.CounterValue, float64(n.DamagedLayers), "layer")
	ch <- metrics.NewLazyConstMetric(c.damaged, metrics.CounterValue, float64(n.DamagedMetadata), "metadata")
}

// registerImageMetrics is called once a process.
func registerImageMetrics(s *image.Store) {
	legacyregistry.CustomMustRegister(newImageCollector(s.Counts))
}
