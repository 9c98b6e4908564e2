package podmirror

import (
	"sync"

	"github.com/containerd/errdefs"
	"k8s.io/component-base/metrics"
	"k8s.io/component-base/metrics/legacyregistry"
)

// The metrics are on the API server's /metrics, whose process this is.
var (
	mirrors = metrics.NewGauge(&metrics.GaugeOpts{
		Subsystem: "atoll", Name: "pod_mirrors",
		Help:           "Pods' VMs that the vCenter inventory shows.",
		StabilityLevel: metrics.ALPHA,
	})
	hostsShown = metrics.NewGauge(&metrics.GaugeOpts{
		Subsystem: "atoll", Name: "pod_mirror_hosts",
		Help:           "Nodes that the vCenter inventory shows as hosts.",
		StabilityLevel: metrics.ALPHA,
	})
	changesTotal = metrics.NewCounterVec(&metrics.CounterOpts{
		Subsystem: "atoll", Name: "pod_mirror_changes_total",
		Help:           "Changes asked of the vCenter inventory, by operation (mirror, unmirror, show_host, remove_host) and result.",
		StabilityLevel: metrics.ALPHA,
	}, []string{"op", "result"})
	reconcileSeconds = metrics.NewHistogramVec(&metrics.HistogramOpts{
		Subsystem: "atoll", Name: "pod_mirror_reconcile_seconds",
		Help:           "Time to make a pod's mirror what it should be.",
		Buckets:        []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 5, 30},
		StabilityLevel: metrics.ALPHA,
	}, nil)
	powerRequests = metrics.NewCounterVec(&metrics.CounterOpts{
		Subsystem: "atoll", Name: "pod_mirror_power_requests_total",
		Help:           "Power operations on mirrors, by operation and result.",
		StabilityLevel: metrics.ALPHA,
	}, []string{"op", "result"})
)

var registerMetrics = sync.OnceFunc(func() {
	legacyregistry.MustRegister(mirrors, hostsShown, changesTotal, reconcileSeconds, powerRequests)
})

const (
	opMirror   = "mirror"
	opUnmirror = "unmirror"

	opShowHost   = "show_host"
	opRemoveHost = "remove_host"
)

func count(op string, err error) { changesTotal.WithLabelValues(op, result(err)).Inc() }

func result(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errdefs.IsFailedPrecondition(err):
		return "refused"
	default:
		return "failed"
	}
}
