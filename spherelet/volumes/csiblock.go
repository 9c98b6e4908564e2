package volumes

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/volume"
)

// NewBlockVolumeUnmapper implements volume.BlockVolumePlugin.
func (p csiPlugin) NewBlockVolumeUnmapper(name string, podUID types.UID) (volume.BlockVolumeUnmapper, error) {
	u, err := p.upstreamCSI.NewBlockVolumeUnmapper(name, podUID)
	if err != nil {
		return nil, err
	}
	custom, ok := u.(volume.CustomBlockVolumeUnmapper)
	if !ok {
		return nil, fmt.Errorf("volume %s: upstream's plug-in unmaps otherwise than is known", name)
	}
	return csiUnmapper{custom, podUID}, nil
}

// csiUnmapper takes away what the kubelet put on the record of a raw volume: a
// bind mount and a loop device, as on the device that it takes it for. Undoing
// that, it looks for the device, finds a file, and fails for ever.
type csiUnmapper struct {
	volume.CustomBlockVolumeUnmapper
	podUID types.UID
}

// GetPodDeviceMapPath implements volume.BlockVolume. Of an unmapper it is called
// once, right before the kubelet unmaps.
func (u csiUnmapper) GetPodDeviceMapPath() (dir, name string) {
	if global, err := u.GetGlobalMapPath(nil); err == nil {
		// Fails loudly in the kubelet's own turn, which then tries again.
		_ = releaseRecord(filepath.Join(global, string(u.podUID)))
	}
	return u.CustomBlockVolumeUnmapper.GetPodDeviceMapPath()
}

// releaseRecord frees the loop devices of a regular file, and unmounts what is
// mounted on it, as often as the kubelet mounted it. Devices, which are other
// drivers', are left alone.
func releaseRecord(path string) error {
	fi, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !fi.Mode().IsRegular() {
		return nil
	}
	if err != nil {
		return err
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	if err := DetachLoops(func(backing string) bool { return backing == real }); err != nil {
		return err
	}
	for {
		switch err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); {
		case errors.Is(err, unix.EINVAL): // nothing is mounted there
			return nil
		case err != nil:
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
}

// DetachLoops frees the loop devices on files that match.
func DetachLoops(match func(backing string) bool) error {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, file := range files {
		backing, rerr := os.ReadFile(file)
		if rerr != nil || !match(strings.TrimSpace(string(backing))) {
			continue // gone meanwhile, or somebody else's
		}
		err = errors.Join(err, detachLoop(filepath.Join("/dev", strings.Split(file, "/")[3])))
	}
	return err
}

func detachLoop(device string) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0); err != nil && !errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("detach %s: %w", device, err)
	}
	return nil
}
