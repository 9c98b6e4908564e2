// Package admission says which pods a node of virtual machines cannot honour,
// and why, before anything is made for them. It is pure; package spherelet
// calls it from the kubelet's admission, for pods of the API server and for
// static pods alike.
//
// Nothing is silently ignored: what cannot be done is refused with the field,
// the reason and the alternative, and what is accepted without an effect
// yields a Notice.
package admission

import (
	"fmt"
	"strings"

	v1 "k8s.io/api/core/v1"

	"github.com/openatoll/atoll/vmpod"
)

// A Host is what the answer depends on besides the Pod.
type Host struct {
	// CPUs, Memory and Disk (bytes) of the host; 0 means unknown, unchecked.
	CPUs   int
	Memory int64
	Disk   int64
	// ImageDisks is how many different images one VM can have as disks, as
	// the driver tells; 0 means unknown, unchecked.
	ImageDisks int
	// ExtendedResource reports whether the Node offers an extended resource
	// (an admin's opaque counter; device plug-ins cannot register). Nil: none.
	ExtendedResource func(name string) bool
	// HostDirectories are where hostPath volumes may be; none: nowhere.
	HostDirectories []vmpod.HostDirectory
	// What the runtime and the guest can do.
	UserNamespaces    bool // hostUsers: false
	ImageVolumes      bool // volumes of kind image
	PersistentVolumes bool // persistentVolumeClaim, ephemeral and our driver's csi
	AppArmor          bool // profiles inside the guest
}

// A Refusal is one field that cannot be honoured.
type Refusal struct {
	// Field is the path as kubectl explain writes it.
	Field string
	// Reason is a CamelCase word, the pod status's reason.
	Reason string
	// Why is a clause and Instead what to do; both without a full stop.
	Why, Instead string
}

func (r Refusal) String() string {
	s := r.Field + ": " + r.Why
	if r.Instead != "" {
		s += "; " + r.Instead
	}
	return s
}

// A Notice is about a field that is accepted and has no effect here.
type Notice struct {
	Field, Reason, Message string
}

// Reasons of refusals and notices.
const (
	ReasonHostNamespace     = "HostNamespaceUnsupported"
	ReasonVolume            = "VolumeUnsupported"
	ReasonBlockDevice       = "VolumeDeviceUnsupported"
	ReasonResourceClaim     = "ResourceClaimUnsupported"
	ReasonExtendedResource  = "ExtendedResourceUnsupported"
	ReasonHugePages         = "HugePagesUnsupported"
	ReasonUserNamespace     = "UserNamespaceUnsupported"
	ReasonAppArmor          = "AppArmorUnsupported"
	ReasonWindows           = "WindowsUnsupported"
	ReasonTooLarge          = "PodLargerThanHost"
	ReasonTooManyDisks      = "TooManyDisks"
	ReasonNoEffectOfSELinux = "SELinuxNotInGuest"
)

// maxMessage bounds (bytes) what goes into a pod's status and event.
const maxMessage = 1000

const deprecatedAppArmorKey = "container.apparmor.security.beta.kubernetes.io/"

// Alternatives that several refusals name.
const (
	removeTheField          = "remove the field"
	emptyDirInstead         = "use an emptyDir, or a configMap, secret, projected or downwardAPI volume"
	networkServiceInstead   = "use a Service, a hostPort, or connect to the node's address"
	persistentVolumeInstead = "use an emptyDir for scratch data"
)

// Check returns everything about pod that host cannot honour, in the order of
// the pod's fields; nothing means that the pod can run.
func Check(pod *v1.Pod, host Host) []Refusal {
	c := checker{pod: pod, host: host}
	c.hostNamespaces()
	c.platform()
	c.volumes()
	c.claims()
	for i := range pod.Spec.InitContainers {
		c.container(fmt.Sprintf("spec.initContainers[%d]", i), &pod.Spec.InitContainers[i])
	}
	for i := range pod.Spec.Containers {
		c.container(fmt.Sprintf("spec.containers[%d]", i), &pod.Spec.Containers[i])
	}
	c.podSecurity()
	c.disks()
	c.size()
	return c.refusals
}

// Explain puts refusals into the one reason and message of a pod's status.
func Explain(rs []Refusal) (reason, message string) {
	if len(rs) == 0 {
		return "", ""
	}
	var b strings.Builder
	for i, r := range rs {
		s := r.String()
		if b.Len()+len(s) > maxMessage {
			fmt.Fprintf(&b, " (and %d more)", len(rs)-i)
			break
		}
		if i > 0 {
			b.WriteString(". ")
		}
		b.WriteString(s)
	}
	return rs[0].Reason, b.String()
}

// Notices returns what of pod is accepted without an effect.
func Notices(pod *v1.Pod) []Notice {
	var ns []Notice
	note := func(field string, o *v1.SELinuxOptions) {
		if o != nil {
			ns = append(ns, Notice{Field: field, Reason: ReasonNoEffectOfSELinux,
				Message: field + " has no effect: the pod's VM has a kernel of its own, without SELinux"})
		}
	}
	if sc := pod.Spec.SecurityContext; sc != nil {
		note("spec.securityContext.seLinuxOptions", sc.SELinuxOptions)
	}
	each(pod, func(field string, c *v1.Container) {
		if sc := c.SecurityContext; sc != nil {
			note(field+".securityContext.seLinuxOptions", sc.SELinuxOptions)
		}
	})
	return ns
}

// Images returns the different image references of pod, in order.
func Images(pod *v1.Pod) []string {
	var refs []string
	seen := map[string]bool{}
	add := func(ref string) {
		if ref != "" && !seen[ref] {
			seen[ref] = true
			refs = append(refs, ref)
		}
	}
	each(pod, func(_ string, c *v1.Container) { add(c.Image) })
	for _, v := range pod.Spec.Volumes {
		if v.Image != nil {
			add(v.Image.Reference)
		}
	}
	return refs
}

func each(pod *v1.Pod, f func(field string, c *v1.Container)) {
	for i := range pod.Spec.InitContainers {
		f(fmt.Sprintf("spec.initContainers[%d]", i), &pod.Spec.InitContainers[i])
	}
	for i := range pod.Spec.Containers {
		f(fmt.Sprintf("spec.containers[%d]", i), &pod.Spec.Containers[i])
	}
}
