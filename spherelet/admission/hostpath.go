package admission

import (
	"fmt"
	"path"
	"strings"

	v1 "k8s.io/api/core/v1"

	"github.com/openatoll/atoll/vmpod"
)

// HostDirectoriesKey is the key of the node's configuration that allows
// hostPath volumes.
const HostDirectoriesKey = "hostDirectories"

// hostPath refuses a hostPath volume that the node's configuration does not
// allow. It goes by names: a link that leads out is met when the container is
// made.
func (c *checker) hostPath(field string, v *v1.Volume) {
	h := v.HostPath
	if h.Type != nil {
		switch *h.Type {
		case v1.HostPathUnset, v1.HostPathDirectory, v1.HostPathDirectoryOrCreate, v1.HostPathFile, v1.HostPathFileOrCreate:
		default:
			c.refuse(field+".type", ReasonVolume, fmt.Sprintf("a %s of the node cannot be reached from a pod VM", *h.Type), emptyDirInstead)
			return
		}
	}
	dir, ok := vmpod.FindHostDirectory(c.host.HostDirectories, path.Clean(h.Path))
	switch {
	case len(c.host.HostDirectories) == 0:
		c.refuse(field, ReasonVolume, "a pod VM shares no file system with the node", emptyDirInstead+
			", or have the operator name the directory in "+HostDirectoriesKey+" of the node's configuration")
		return
	case !ok:
		c.refuse(field, ReasonVolume, fmt.Sprintf("%s is not among the directories that %s of the node's configuration allows (%s)", h.Path, HostDirectoriesKey, c.allowed()),
			"have the operator add it, or use an emptyDir")
		return
	case c.pod.Spec.HostUsers != nil && !*c.pod.Spec.HostUsers:
		c.refuse(field, ReasonVolume, "with hostUsers false the owners of the node's files cannot be mapped", "leave one of the two out")
		return
	}
	each(c.pod, func(at string, ct *v1.Container) {
		for i, m := range ct.VolumeMounts {
			if m.Name == v.Name {
				c.hostPathMount(fmt.Sprintf("%s.volumeMounts[%d](%s)", at, i, m.Name), m, dir)
			}
		}
	})
}

func (c *checker) hostPathMount(field string, m v1.VolumeMount, dir vmpod.HostDirectory) {
	propagation := v1.MountPropagationNone
	if m.MountPropagation != nil {
		propagation = *m.MountPropagation
	}
	switch {
	case m.SubPath != "" || m.SubPathExpr != "":
		c.refuse(field+".subPath", ReasonVolume, "a sub-path of a hostPath is not offered", "put it into hostPath.path")
	case propagation == v1.MountPropagationBidirectional:
		c.refuse(field+".mountPropagation", ReasonVolume, "mounts made in a pod VM cannot appear on the node", "use HostToContainer or None")
	case dir.ReadOnly && !m.ReadOnly:
		c.refuse(field+".readOnly", ReasonVolume, fmt.Sprintf("%s of the node's configuration allows %s only to be read", HostDirectoriesKey, dir.Path), "set readOnly: true")
	case dir.ReadOnly && propagation == v1.MountPropagationHostToContainer:
		c.refuse(field+".mountPropagation", ReasonVolume, fmt.Sprintf("%s of the node's configuration allows %s only to be read, and mounts that come later could not be kept read-only", HostDirectoriesKey, dir.Path), "leave it out")
	}
}

// allowed lists the directories for people.
func (c *checker) allowed() string {
	var paths []string
	for _, d := range c.host.HostDirectories {
		paths = append(paths, d.Path)
	}
	return strings.Join(paths, ", ")
}
