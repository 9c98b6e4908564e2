package main

import (
	"strings"
	"testing"

	"k8s.io/component-base/metrics/testutil"

	"github.com/openatoll/atoll/storage/image"
)

func TestImageMetrics(t *testing.T) {
	c := newImageCollector(func() image.Counts {
		return image.Counts{Converted: 12345678, DamagedLayers: 2, DamagedMetadata: 1}
	})
	want := `
		# HELP atoll_image_converted_bytes_total [ALPHA] Bytes written to make disks of images. A second pod of an image adds none.
		# TYPE atoll_image_converted_bytes_total counter
		atoll_image_converted_bytes_total 1.2345678e+07
		# HELP atoll_image_damaged_total [ALPHA] Parts of images' disks that were found damaged, by part (layer or metadata).
		# TYPE atoll_image_damaged_total counter
		atoll_image_damaged_total{part="layer"} 2
		atoll_image_damaged_total{part="metadata"} 1
	`
	if err := testutil.CustomCollectAndCompare(c, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
}
