package admission

import (
	"fmt"
	"strings"

	v1 "k8s.io/api/core/v1"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/spherelet/resources"
)

type checker struct {
	pod      *v1.Pod
	host     Host
	refusals []Refusal
}

func (c *checker) refuse(field, reason, why, instead string) {
	c.refusals = append(c.refusals, Refusal{Field: field, Reason: reason, Why: why, Instead: instead})
}

func (c *checker) hostNamespaces() {
	s := &c.pod.Spec
	if s.HostNetwork {
		c.refuse("spec.hostNetwork", ReasonHostNamespace, "the pod is a virtual machine with a network stack of its own and cannot share the node's", networkServiceInstead)
	}
	if s.HostPID {
		c.refuse("spec.hostPID", ReasonHostNamespace, "the pod's VM has a kernel of its own and cannot see the node's processes", "use shareProcessNamespace for one PID namespace inside the pod")
	}
	if s.HostIPC {
		c.refuse("spec.hostIPC", ReasonHostNamespace, "the pod's VM has a kernel of its own and cannot share the node's IPC", "containers of one pod share IPC already")
	}
	if s.HostUsers != nil && !*s.HostUsers && !c.host.UserNamespaces {
		c.refuse("spec.hostUsers", ReasonUserNamespace, "user namespaces are not offered inside pod VMs yet", "leave hostUsers out: the VM already keeps root of the pod apart from root of the node")
	}
}

func (c *checker) platform() {
	if os := c.pod.Spec.OS; os != nil && os.Name != v1.Linux {
		c.refuse("spec.os.name", ReasonWindows, fmt.Sprintf("%q does not run here, pod VMs boot Linux", os.Name), "schedule the pod on a node of that system")
	}
}

// mountedOnHost are kinds of volumes that only exist as mounts on the node.
// The VM shares no file system with the node.
func mountedOnHost(s *v1.VolumeSource) string {
	switch {
	case s.NFS != nil:
		return "nfs"
	case s.ISCSI != nil:
		return "iscsi"
	case s.FC != nil:
		return "fc"
	case s.RBD != nil:
		return "rbd"
	case s.CephFS != nil:
		return "cephfs"
	case s.Glusterfs != nil:
		return "glusterfs"
	case s.Cinder != nil:
		return "cinder"
	case s.FlexVolume != nil:
		return "flexVolume"
	case s.GitRepo != nil:
		return "gitRepo"
	case s.GCEPersistentDisk != nil:
		return "gcePersistentDisk"
	case s.AWSElasticBlockStore != nil:
		return "awsElasticBlockStore"
	case s.AzureDisk != nil:
		return "azureDisk"
	case s.AzureFile != nil:
		return "azureFile"
	case s.VsphereVolume != nil:
		return "vsphereVolume"
	case s.Quobyte != nil:
		return "quobyte"
	case s.PhotonPersistentDisk != nil:
		return "photonPersistentDisk"
	case s.PortworxVolume != nil:
		return "portworxVolume"
	case s.ScaleIO != nil:
		return "scaleIO"
	case s.StorageOS != nil:
		return "storageos"
	case s.Flocker != nil:
		return "flocker"
	case s.CSI != nil:
		return "csi"
	}
	return ""
}

func (c *checker) volumes() {
	for i := range c.pod.Spec.Volumes {
		v := &c.pod.Spec.Volumes[i]
		field := fmt.Sprintf("spec.volumes[%d](%s).", i, v.Name)
		if v.HostPath != nil {
			c.hostPath(field+"hostPath", v)
			continue
		}
		if v.CSI != nil && v.CSI.Driver == v1alpha1.CSIDriverName && c.host.PersistentVolumes {
			continue
		}
		if kind := mountedOnHost(&v.VolumeSource); kind != "" {
			why := "a volume of this kind is mounted on the node, and a pod VM shares no file system with the node"
			instead := emptyDirInstead
			switch kind {
			case "gitRepo":
				why = "gitRepo volumes run git on the node as root"
				instead = "clone in an init container into an emptyDir"
			case "nfs":
				instead = "mount the share inside the container, which may be privileged in its own VM"
			}
			c.refuse(field+kind, ReasonVolume, why, instead)
			continue
		}
		switch {
		case v.EmptyDir != nil && v.EmptyDir.Medium != v1.StorageMediumDefault && v.EmptyDir.Medium != v1.StorageMediumMemory:
			c.refuse(field+"emptyDir.medium", ReasonHugePages, fmt.Sprintf("%q is not offered inside pod VMs", v.EmptyDir.Medium), `use "Memory" or leave it out`)
		case v.Image != nil && !c.host.ImageVolumes:
			c.refuse(field+"image", ReasonVolume, "images as volumes are not offered yet", "copy the files from an init container into an emptyDir")
		case v.PersistentVolumeClaim != nil && !c.host.PersistentVolumes:
			c.refuse(field+"persistentVolumeClaim", ReasonVolume, "this node offers no persistent volumes", persistentVolumeInstead)
		case v.Ephemeral != nil && !c.host.PersistentVolumes:
			c.refuse(field+"ephemeral", ReasonVolume, "this node offers no persistent volumes", persistentVolumeInstead)
		}
	}
}

func (c *checker) claims() {
	for i, rc := range c.pod.Spec.ResourceClaims {
		c.refuse(fmt.Sprintf("spec.resourceClaims[%d](%s)", i, rc.Name), ReasonResourceClaim,
			"devices of the node cannot be given to a pod VM yet", "run the pod on a node of containers")
	}
}

func (c *checker) container(field string, ct *v1.Container) {
	for i, d := range ct.VolumeDevices {
		if c.host.PersistentVolumes {
			break
		}
		c.refuse(fmt.Sprintf("%s.volumeDevices[%d](%s)", field, i, d.Name), ReasonBlockDevice,
			"this node offers no persistent volumes", "run the pod on a node that does")
	}
	c.extended(field+".resources.requests", ct.Resources.Requests)
	if sc := ct.SecurityContext; sc != nil {
		c.appArmor(field+".securityContext.appArmorProfile", sc.AppArmorProfile)
		if sc.WindowsOptions != nil {
			c.refuse(field+".securityContext.windowsOptions", ReasonWindows, "pod VMs boot Linux", removeTheField)
		}
	}
}

func (c *checker) extended(field string, list v1.ResourceList) {
	for name := range list {
		n := string(name)
		switch {
		case name == v1.ResourceCPU || name == v1.ResourceMemory || name == v1.ResourceEphemeralStorage:
		case strings.HasPrefix(n, v1.ResourceHugePagesPrefix):
			c.refuse(field+"["+n+"]", ReasonHugePages, "huge pages are not offered inside pod VMs", "request memory; the kernel uses transparent huge pages")
		case !strings.Contains(n, "/"):
		case c.host.ExtendedResource == nil || !c.host.ExtendedResource(n):
			c.refuse(field+"["+n+"]", ReasonExtendedResource, "the node does not offer it, and devices of device plug-ins cannot be given to a pod VM", "run the pod on a node that offers the device")
		}
	}
}

func (c *checker) appArmor(field string, p *v1.AppArmorProfile) {
	if p == nil || c.host.AppArmor || p.Type == v1.AppArmorProfileTypeUnconfined {
		return
	}
	c.refuse(field, ReasonAppArmor, fmt.Sprintf("profile %q cannot be applied, the kernel in the pod's VM runs without AppArmor", p.Type),
		"leave it out or use Unconfined; seccompProfile is applied")
}

func (c *checker) podSecurity() {
	if sc := c.pod.Spec.SecurityContext; sc != nil {
		c.appArmor("spec.securityContext.appArmorProfile", sc.AppArmorProfile)
		if sc.WindowsOptions != nil {
			c.refuse("spec.securityContext.windowsOptions", ReasonWindows, "pod VMs boot Linux", removeTheField)
		}
	}
	for i := range c.pod.Spec.Containers {
		name := c.pod.Spec.Containers[i].Name
		profile := c.pod.Annotations[deprecatedAppArmorKey+name]
		if profile != "" && profile != "unconfined" && !c.host.AppArmor && !c.hasAppArmorField(i) {
			c.refuse("metadata.annotations["+deprecatedAppArmorKey+name+"]", ReasonAppArmor,
				fmt.Sprintf("profile %q cannot be applied, the kernel in the pod's VM runs without AppArmor", profile), removeTheField)
		}
	}
}

// hasAppArmorField avoids saying twice what the API server copied from the
// annotation into the field.
func (c *checker) hasAppArmorField(i int) bool {
	sc := c.pod.Spec.Containers[i].SecurityContext
	return sc != nil && sc.AppArmorProfile != nil
}

func (c *checker) disks() {
	if n := len(Images(c.pod)); c.host.ImageDisks > 0 && n > c.host.ImageDisks {
		c.refuse("spec.containers[*].image", ReasonTooManyDisks,
			fmt.Sprintf("the pod uses %d different images and a pod VM has room for %d", n, c.host.ImageDisks), "use fewer images, or several pods")
	}
}

// size refuses requests that the host could never grant. Limits beyond the
// host are no error in Kubernetes: the VM is then as large as the host.
func (c *checker) size() {
	cpu, memory, disk := resources.Requests(c.pod)
	const mib = 1 << 20
	if c.host.CPUs > 0 && cpu > int64(c.host.CPUs)*1000 {
		c.refuse("spec.containers[*].resources.requests.cpu", ReasonTooLarge,
			fmt.Sprintf("the pod requests %d millicores and the host has %d CPUs", cpu, c.host.CPUs), "request less, or use a larger node")
	}
	if c.host.Memory > 0 && memory > c.host.Memory {
		c.refuse("spec.containers[*].resources.requests.memory", ReasonTooLarge,
			fmt.Sprintf("the pod requests %d MiB and the host has %d MiB", memory/mib, c.host.Memory/mib), "request less, or use a larger node")
	}
	if c.host.Disk > 0 && disk > c.host.Disk {
		c.refuse("spec.containers[*].resources.requests.ephemeral-storage", ReasonTooLarge,
			fmt.Sprintf("the pod requests %d MiB and the host's disk has %d MiB", disk/mib, c.host.Disk/mib), "request less, or use a larger node")
	}
}
