package spherelet

import (
	"fmt"
	"log/slog"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/spherelet/config"
	"github.com/openatoll/atoll/spherelet/volumes"
	"github.com/openatoll/atoll/vmpod"
)

// Options is everything that Run needs. Config and Preparer are required.
type Options struct {
	// Config as package config has loaded and checked it, and Paths as
	// config.Prepare has made them.
	Config *v1alpha1.SphereletConfiguration
	Paths  config.Paths
	// Preparer is told of every pod at admission.
	Preparer vmpod.Preparer
	// Subscribe calls its argument after every change of a pod's sandboxes
	// or containers, in order; the kubelet then looks at once instead of
	// within a second. May be nil.
	Subscribe func(func(podUID string))
	// Faults calls its argument for every fault of a pod's VM, and when it is
	// over. May be nil.
	Faults func(func(vmpod.Fault))
	// Starts calls its argument when the first container of a pod's VM has
	// started. May be nil.
	Starts func(func(vmpod.Start))
	// PodVMs calls its argument for every pod's VM that is there, is made or has
	// grown; perhaps more than once. May be nil.
	PodVMs func(func(vmpod.PodVM))
	// Notices calls its argument for what users of a pod should know. May be
	// nil.
	Notices func(func(vmpod.Notice))
	// VolumeUsage asks the guest how full a volume is. May be nil.
	VolumeUsage volumes.UsageFunc
	// SubPaths has the guest look at sub-paths of volumes before a container is
	// created. May be nil.
	SubPaths volumes.SubPathFunc
	// CSISocket is where the CSI driver of this process answers, which is then
	// registered with the kubelet; empty: the node offers no persistent volumes.
	CSISocket string
	// Facts about the hypervisor, for labels, condition and events.
	Facts Facts
	// ImageDisks is how many different images one VM can have; 0: unchecked.
	ImageDisks int
	// Logger for this package; default slog.Default(). The kubelet's own
	// messages go there too, with the key "component".
	Logger *slog.Logger
}

// Facts are what the hypervisor driver knows of this host.
type Facts struct {
	// Accelerator is "kvm" or "tcg": what pod VMs run on.
	Accelerator string
	// KVM is "usable", "unusable" (present, but a probe failed) or "absent",
	// and KVMReason a sentence that says why, if it is not usable.
	KVM, KVMReason string
	// GuestKernel is "stock" or "tuned", GuestRelease its version.
	GuestKernel, GuestRelease string
}

// States of KVM on a host.
const (
	KVMUsable   = "usable"
	KVMUnusable = "unusable"
	KVMAbsent   = "absent"
)

func (o *Options) complete() error {
	if o.Config == nil || o.Preparer == nil {
		return fmt.Errorf("spherelet: Config and Preparer are required: %w", errdefs.ErrInvalidArgument)
	}
	if o.Paths == (config.Paths{}) {
		o.Paths = config.PathsOf(o.Config)
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return nil
}
