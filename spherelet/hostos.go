package spherelet

import (
	"os"
	"path/filepath"
	"strings"

	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
)

// legacyLogs is hard-coded in upstream: every kubelet of a machine would make
// links there, and sweep away those of the others.
const legacyLogs = "/var/log/containers"

// hostOS is the real one without links in /var/log/containers.
type hostOS struct{ kubecontainer.RealOS }

func (hostOS) inLegacyLogs(name string) bool {
	return strings.HasPrefix(filepath.Clean(name)+"/", legacyLogs+"/")
}

func (o hostOS) Symlink(oldname, newname string) error {
	if o.inLegacyLogs(newname) {
		return nil
	}
	return o.RealOS.Symlink(oldname, newname)
}

func (o hostOS) Glob(pattern string) ([]string, error) {
	if o.inLegacyLogs(pattern) {
		return nil, nil
	}
	return o.RealOS.Glob(pattern)
}

func (o hostOS) Remove(name string) error {
	if o.inLegacyLogs(name) {
		return nil
	}
	return o.RealOS.Remove(name)
}

func (o hostOS) MkdirAll(name string, perm os.FileMode) error {
	if o.inLegacyLogs(name) {
		return nil
	}
	return o.RealOS.MkdirAll(name, perm)
}
