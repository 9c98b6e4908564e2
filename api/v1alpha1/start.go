package v1alpha1

import "time"

// StartAnnotation is the annotation of a Pod that tells where the time of its
// VM's latest start went: a PodStart in JSON.
const StartAnnotation = "atoll.dev/start-phases"

// PodStart is a pod's start until its first container ran, be it an init
// container. All times are milliseconds.
//
// +kubebuilder:object:generate=false
type PodStart struct {
	// Begun is when the pod was given to the node.
	Begun time.Time `json:"begun"`
	Total int64     `json:"total"`
	// Attempt counts the VMs that the pod had before this one.
	Attempt uint32 `json:"attempt,omitempty"`
	// Prepared says that the VM was begun at admission, before the kubelet asked
	// for it.
	Prepared bool `json:"prepared"`
	// Accelerator is what the VM runs on: kvm or tcg.
	Accelerator string       `json:"accelerator,omitempty"`
	Phases      []StartPhase `json:"phases"`
}

// StartPhase is a stretch of time of a phase: queue, network, image, vm, agent
// or container. A phase may have several, and different ones may overlap.
//
// +kubebuilder:object:generate=false
type StartPhase struct {
	Name string `json:"name"`
	// From is counted from Begun.
	From int64 `json:"from"`
	Took int64 `json:"took"`
}
