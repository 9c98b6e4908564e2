package podinit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
)

// A volume is one that AddVolume made.
type volume struct {
	id   string
	kind agentapi.AddVolumeRequest_Kind
	root string      // its directory, the same inode for the volume's life
	disk *diskVolume // of a DISK
}

// AddVolume makes an EMPTY_DIR, a TMPFS or an empty TREE, or mounts a SHARE or
// a DISK.
func (a *agent) AddVolume(ctx context.Context, r *agentapi.AddVolumeRequest) (*agentapi.AddVolumeResponse, error) {
	if err := a.requireSandbox(); err != nil {
		return nil, err
	}
	if err := checkID("volume", r.Id); err != nil {
		return nil, err
	}
	l := a.lockOf("v/" + r.Id)
	l.Lock()
	defer l.Unlock()
	if v, ok := a.volume(r.Id); ok {
		if v.kind != r.Kind {
			return nil, fmt.Errorf("volume %s is there as %s: %w", r.Id, v.kind, errdefs.ErrAlreadyExists)
		}
		return &agentapi.AddVolumeResponse{}, nil
	}
	if r.Kind == agentapi.AddVolumeRequest_DISK {
		resp, err := a.addDisk(ctx, r)
		if err != nil {
			return nil, fmt.Errorf("volume %s: %w", r.Id, err)
		}
		return resp, nil
	}
	v := &volume{id: r.Id, kind: r.Kind, root: filepath.Join(a.places.volumes, r.Id)}
	if r.Kind == agentapi.AddVolumeRequest_EMPTY_DIR {
		v.root = filepath.Join(a.places.disk, "v", r.Id)
	}
	err := v.create(r, a.userns.shift())
	if err == nil && r.Kind == agentapi.AddVolumeRequest_EMPTY_DIR {
		err = a.usage.projects.assign(r.SizeLimit, v.root)
	}
	if err == nil && r.Kind == agentapi.AddVolumeRequest_SHARE {
		err = mountShare(ctx, r.Share, v.root)
	}
	if err != nil {
		_ = v.destroy()
		return nil, fmt.Errorf("volume %s: %w", r.Id, err)
	}
	a.mu.Lock()
	a.volumes[r.Id] = v
	a.mu.Unlock()
	return &agentapi.AddVolumeResponse{}, nil
}

func (a *agent) volume(id string) (*volume, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	v, ok := a.volumes[id]
	return v, ok
}

// mountable finds a volume that has a directory.
func (a *agent) mountable(id string) (*volume, error) {
	v, ok := a.volume(id)
	if !ok {
		return nil, fmt.Errorf("it is not in this VM; AddVolume first: %w", errdefs.ErrNotFound)
	}
	if v.root == "" {
		return nil, fmt.Errorf("it is a raw device and cannot be mounted: %w", errdefs.ErrFailedPrecondition)
	}
	return v, nil
}

func (v *volume) create(r *agentapi.AddVolumeRequest, shift int) error {
	if err := os.MkdirAll(v.root, 0o755); err != nil {
		return err
	}
	if r.Kind == agentapi.AddVolumeRequest_TMPFS {
		data := "mode=0777"
		if r.SizeLimit > 0 {
			data += ",size=" + strconv.FormatInt(r.SizeLimit, 10)
		}
		if err := unix.Mount("tmpfs", v.root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, data); err != nil {
			return fmt.Errorf("tmpfs: %w", err)
		}
	}
	if r.Kind == agentapi.AddVolumeRequest_TREE || r.Kind == agentapi.AddVolumeRequest_SHARE {
		return nil // the tar, or the host, says how its root is to be
	}
	mode, group := uint32(0o777), 0
	if r.HasFsGroup {
		mode, group = 0o2777, int(r.FsGroup)
	}
	if r.HasFsGroup || shift > 0 {
		if err := os.Chown(v.root, shift, shift+group); err != nil {
			return err
		}
	}
	return unix.Chmod(v.root, mode) // not os.Chmod: its setgid is another bit
}

func (v *volume) destroy() error {
	if v.kind == agentapi.AddVolumeRequest_SHARE {
		// What is still mounted there is the host's: it is never walked.
		if err := detach(v.root); err != nil {
			return err
		}
		if err := os.Remove(v.root); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	if v.kind == agentapi.AddVolumeRequest_TMPFS {
		if err := detach(v.root); err != nil {
			return err
		}
	}
	return os.RemoveAll(v.root)
}

// RemoveVolume erases a volume that no container uses.
func (a *agent) RemoveVolume(ctx context.Context, r *agentapi.RemoveVolumeRequest) (*agentapi.RemoveVolumeResponse, error) {
	if err := a.requireSandbox(); err != nil {
		return nil, err
	}
	l := a.lockOf("v/" + r.Id)
	l.Lock()
	defer l.Unlock()
	a.mu.Lock()
	v, ok := a.volumes[r.Id]
	delete(a.blanks, r.Id)
	for _, c := range a.containers {
		if c.uses(r.Id) {
			a.mu.Unlock()
			return nil, fmt.Errorf("volume %s is used by container %s; remove that first: %w", r.Id, c.id, errdefs.ErrFailedPrecondition)
		}
	}
	a.mu.Unlock()
	if !ok {
		return &agentapi.RemoveVolumeResponse{}, nil
	}
	destroy := v.destroy
	if v.disk != nil {
		destroy = func() error { return v.removeDisk(ctx) }
	}
	err := destroy()
	if err == nil || v.disk == nil || errdefs.IsDataLoss(err) { // else it is asked for again
		a.mu.Lock()
		delete(a.volumes, r.Id)
		a.mu.Unlock()
	}
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", r.Id, err)
	}
	return &agentapi.RemoveVolumeResponse{}, nil
}

// uses says whether a container has a volume.
func (c *container) uses(volume string) bool {
	return slices.ContainsFunc(c.request.Mounts, func(m *agentapi.VolumeMount) bool { return m.Volume == volume }) ||
		slices.ContainsFunc(c.request.Devices, func(d *agentapi.VolumeDevice) bool { return d.Volume == volume })
}
