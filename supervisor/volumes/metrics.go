package volumes

import (
	"sync"

	"github.com/containerd/errdefs"
	"k8s.io/component-base/metrics"
	"k8s.io/component-base/metrics/legacyregistry"

	"github.com/openatoll/atoll/internal/vsphere"
	"github.com/openatoll/atoll/storage"
)

// The metrics are on the API server's /metrics, whose process this is.
var (
	volumesShown = metrics.NewGaugeVec(&metrics.GaugeOpts{
		Subsystem: "atoll", Name: "vsphere_volumes",
		Help:           "Volumes in vCenter that claims have, by whether their storage policies are kept.",
		StabilityLevel: metrics.ALPHA,
	}, []string{"compliance"})
	orphansShown = metrics.NewGauge(&metrics.GaugeOpts{
		Subsystem: "atoll", Name: "vsphere_volume_orphans",
		Help:           "Disks and snapshots in vCenter that bear the cluster's mark and that nobody has.",
		StabilityLevel: metrics.ALPHA,
	})
	callsTotal = metrics.NewCounterVec(&metrics.CounterOpts{
		Subsystem: "atoll", Name: "vsphere_volume_calls_total",
		Help:           "Calls made to vCenter for volumes, by method and class of error.",
		StabilityLevel: metrics.ALPHA,
	}, []string{"method", "error"})
)

var registerMetrics = sync.OnceFunc(func() {
	legacyregistry.MustRegister(volumesShown, orphansShown, callsTotal)
	legacyregistry.CustomMustRegister(shownDisks)
})

func vcenterCall(c vsphere.Call) { callsTotal.WithLabelValues(c.Method, errorClass(c.Err)).Inc() }

func errorClass(err error) string {
	switch {
	case err == nil:
		return ""
	case errdefs.IsPermissionDenied(err):
		return "permission-denied"
	case errdefs.IsUnavailable(err):
		return "unavailable"
	case errdefs.IsNotFound(err):
		return "not-found"
	}
	return "other"
}

// showVolumes is told how many volumes there are of each state.
func showVolumes(counts map[storage.ComplianceState]int) {
	for _, state := range []storage.ComplianceState{storage.Compliant, storage.NonCompliant, storage.ComplianceUnknown} {
		volumesShown.WithLabelValues(string(state)).Set(float64(counts[state]))
	}
}

// forgetVolumes: of a vCenter that is not served nothing is known.
func forgetVolumes() {
	volumesShown.Reset()
	orphansShown.Set(0)
	shownDisks.forget()
}
