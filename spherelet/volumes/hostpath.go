package volumes

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	v1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/volume"
	"k8s.io/kubernetes/pkg/volume/hostpath"

	"github.com/openatoll/atoll/vmpod"
)

// hostPath is upstream's plug-in, but for what it does on the host: upstream
// checks and makes paths wherever links lead, and a pod may have made links in
// a directory that it shares.
type hostPath struct {
	volume.VolumePlugin
	dirs []vmpod.HostDirectory
}

// NewHostPath returns the plug-in of hostPath volumes in these directories.
func NewHostPath(dirs []vmpod.HostDirectory) volume.VolumePlugin {
	return hostPath{hostpath.ProbeVolumePlugins(volume.VolumeConfig{})[0], dirs}
}

// NewMounter implements volume.VolumePlugin.
func (p hostPath) NewMounter(spec *volume.Spec, pod *v1.Pod) (volume.Mounter, error) {
	if spec.Volume == nil || spec.Volume.HostPath == nil {
		return nil, fmt.Errorf("volume %s is no hostPath of a pod", spec.Name())
	}
	m, err := p.VolumePlugin.NewMounter(spec, pod)
	if err != nil {
		return nil, err
	}
	path := filepath.Clean(spec.Volume.HostPath.Path)
	dir, ok := vmpod.FindHostDirectory(p.dirs, path)
	if !ok {
		return nil, fmt.Errorf("hostPath %s is in no directory that hostDirectories of the node's configuration allows", path)
	}
	kind := v1.HostPathUnset
	if t := spec.Volume.HostPath.Type; t != nil {
		kind = *t
	}
	return hostPathMounter{m, dir, path, kind}, nil
}

type hostPathMounter struct {
	volume.Mounter
	dir  vmpod.HostDirectory
	path string
	kind v1.HostPathType
}

// SetUp checks the volume's type, making the directory or file if the type
// asks for it. No link on the way may lead out of the allowed directory.
func (m hostPathMounter) SetUp(volume.MounterArgs) error {
	if err := m.setUp(); err != nil {
		return fmt.Errorf("hostPath %s: %w", m.path, err)
	}
	return nil
}

func (m hostPathMounter) setUp() error {
	if m.kind == v1.HostPathUnset {
		return nil
	}
	root, err := os.OpenRoot(m.dir.Path)
	if err != nil {
		return err
	}
	defer root.Close()
	rel, err := filepath.Rel(m.dir.Path, m.path)
	if err != nil {
		return err
	}
	fi, err := root.Stat(rel)
	if errors.Is(err, fs.ErrNotExist) {
		if err := m.create(root, rel); err != nil {
			return err
		}
		fi, err = root.Stat(rel)
	}
	if err != nil {
		return err
	}
	directory := m.kind == v1.HostPathDirectory || m.kind == v1.HostPathDirectoryOrCreate
	if directory && !fi.IsDir() || !directory && !fi.Mode().IsRegular() {
		return fmt.Errorf("it is no %s, as the volume's type says", map[bool]string{true: "directory", false: "file"}[directory])
	}
	return nil
}

// create makes what is not there, with upstream's modes.
func (m hostPathMounter) create(root *os.Root, rel string) error {
	switch {
	case m.kind != v1.HostPathDirectoryOrCreate && m.kind != v1.HostPathFileOrCreate:
		return fmt.Errorf("it is not there, and type %s does not make it", m.kind)
	case m.dir.ReadOnly:
		return fmt.Errorf("it is not there, and hostDirectories of the node's configuration allows %s only to be read", m.dir.Path)
	case m.kind == v1.HostPathDirectoryOrCreate:
		return root.MkdirAll(rel, 0o755)
	}
	// Never what a pod has put there meanwhile: to open a pipe would wait.
	f, err := root.OpenFile(rel, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return f.Close()
}
