package namespaces

import (
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	compmetrics "k8s.io/component-base/metrics"
	"k8s.io/component-base/metrics/legacyregistry"

	"github.com/openatoll/atoll/supervisor/namespaces/vc"
)

// Metrics are on the /metrics of the supervisor's API server, with those of the
// other components of the process.
type metrics struct {
	reconciles  *compmetrics.CounterVec
	reconcile   *compmetrics.HistogramVec
	drifts      *compmetrics.CounterVec
	calls       *compmetrics.CounterVec
	callSeconds *compmetrics.HistogramVec
	lag         *compmetrics.Gauge
	connected   *compmetrics.Gauge
	orphans     *compmetrics.Gauge
}

// waitMethod lasts as long as nothing happens.
const waitMethod = "WaitForUpdatesEx"

// theMetrics are registered once a process, whatever is started in it.
var theMetrics = sync.OnceValue(func() *metrics {
	const subsystem = "atoll_namespaces"
	counter := func(name, help string, labels ...string) *compmetrics.CounterVec {
		return compmetrics.NewCounterVec(&compmetrics.CounterOpts{Subsystem: subsystem, Name: name, Help: help, StabilityLevel: compmetrics.ALPHA}, labels)
	}
	histogram := func(name, help string, labels ...string) *compmetrics.HistogramVec {
		return compmetrics.NewHistogramVec(&compmetrics.HistogramOpts{
			Subsystem: subsystem, Name: name, Help: help, StabilityLevel: compmetrics.ALPHA,
			Buckets: compmetrics.ExponentialBuckets(0.001, 2.5, 13),
		}, labels)
	}
	gauge := func(name, help string) *compmetrics.Gauge {
		return compmetrics.NewGauge(&compmetrics.GaugeOpts{Subsystem: subsystem, Name: name, Help: help, StabilityLevel: compmetrics.ALPHA})
	}
	m := &metrics{
		reconciles:  counter("reconciles_total", "Reconciles by controller and outcome.", "controller", "outcome"),
		reconcile:   histogram("reconcile_seconds", "Duration of reconciles by controller.", "controller"),
		drifts:      counter("drifts_total", "Changes by others that were found, by what was changed and whether it was mended or adopted.", "field", "outcome"),
		calls:       counter("vcenter_calls_total", "Calls made to vCenter by method and class of error.", "method", "error"),
		callSeconds: histogram("vcenter_call_seconds", "Duration of calls to vCenter by method, without waits for updates.", "method"),
		lag:         gauge("watch_lag_seconds", "How long the last change of our own took to come back through the watch of vCenter."),
		connected:   gauge("vcenter_connected", "Whether vCenter answers."),
		orphans:     gauge("orphans", "Pools and folders in vSphere whose SupervisorNamespace is gone."),
	}
	legacyregistry.MustRegister(m.reconciles, m.reconcile, m.drifts, m.calls, m.callSeconds, m.lag, m.connected, m.orphans)
	return m
})

func (m *metrics) reconciled(controller, outcome string, took time.Duration) {
	m.reconciles.WithLabelValues(controller, outcome).Inc()
	m.reconcile.WithLabelValues(controller).Observe(took.Seconds())
}

func (m *metrics) drifted(field, outcome string) { m.drifts.WithLabelValues(field, outcome).Inc() }

func (m *metrics) vcenterCall(method string, took time.Duration, err error) {
	m.calls.WithLabelValues(method, errorClass(err)).Inc()
	if !strings.HasPrefix(method, waitMethod) {
		m.callSeconds.WithLabelValues(method).Observe(took.Seconds())
	}
}

func (m *metrics) health(h vc.Health) {
	m.lag.Set(h.Lag.Seconds())
	connected := 0.0
	if h.Connected {
		connected = 1
	}
	m.connected.Set(connected)
}

func errorClass(err error) string {
	switch {
	case err == nil:
		return ""
	case errdefs.IsUnavailable(err):
		return "unavailable"
	case errdefs.IsPermissionDenied(err):
		return "permission-denied"
	case errdefs.IsAlreadyExists(err):
		return "already-exists"
	case errdefs.IsInvalidArgument(err):
		return "invalid-argument"
	case errdefs.IsFailedPrecondition(err):
		return "failed-precondition"
	case errdefs.IsAborted(err):
		return "aborted"
	}
	return "other"
}
