package spherelet

import (
	"k8s.io/component-base/metrics"
	"k8s.io/component-base/metrics/legacyregistry"
)

// The metrics stand beside the kubelet's, in its registry.
var (
	admissionRefusals = metrics.NewCounterVec(&metrics.CounterOpts{
		Subsystem: "atoll", Name: "admission_refusals_total",
		Help:           "Pods refused because a VM cannot honour a field, by reason.",
		StabilityLevel: metrics.ALPHA,
	}, []string{"reason"})
	preparationsTotal = metrics.NewCounterVec(&metrics.CounterOpts{
		Subsystem: "atoll", Name: "preparations_total",
		Help:           "Pod VMs that the runtime was asked to prepare at admission, by result.",
		StabilityLevel: metrics.ALPHA,
	}, []string{"result"})
	vmFaults = metrics.NewCounterVec(&metrics.CounterOpts{
		Subsystem: "atoll", Name: "pod_vm_faults_total",
		Help:           "Faults of pods' VMs, their unwanted ends included, by reason.",
		StabilityLevel: metrics.ALPHA,
	}, []string{"reason"})
	startPhases = metrics.NewHistogramVec(&metrics.HistogramOpts{
		Subsystem: "atoll", Name: "pod_start_phase_seconds",
		Help:           "Time that a phase of pods' starts was under way, until the first container ran; phase total is all of it.",
		Buckets:        []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300},
		StabilityLevel: metrics.ALPHA,
	}, []string{"phase"})
	hostInfo = metrics.NewGaugeVec(&metrics.GaugeOpts{
		Subsystem: "atoll", Name: "host_info",
		Help:           "1, labelled with how pod VMs run on this host.",
		StabilityLevel: metrics.ALPHA,
	}, []string{"accelerator", "kvm", "guest_kernel", "guest_release", "version"})
)

func registerMetrics(f Facts, version string) {
	legacyregistry.MustRegister(admissionRefusals, preparationsTotal, vmFaults, startPhases, hostInfo)
	hostInfo.WithLabelValues(f.Accelerator, f.KVM, f.GuestKernel, f.GuestRelease, version).Set(1)
}
