package vmpod

import "time"

// ReasonImageDamaged: the pod's VM may have read what is not its image.
const ReasonImageDamaged = "ImageDamaged"

// A Notice is something that a pod's users should know. Unlike a Fault it says
// nothing of the VM, and is never over.
type Notice struct {
	PodUID, Namespace, Name string
	// Reason is a CamelCase word and Message a sentence for people.
	Reason, Message string
	At              time.Time
}
