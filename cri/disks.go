package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// Disks is what the runtime wants of a storage.Disks.
type Disks interface {
	Attach(ctx context.Context, id string, h storage.Holder, o storage.AttachOptions) (storage.Attachment, error)
	Detach(ctx context.Context, id string, h storage.Holder) error
}

// A Formatter makes empty file systems. Format calls write with each extent of
// one for a disk of size bytes: data of at most agentapi.MaxExtent, or nil for
// length zeroes. With noise the disk reads as zeroes only in its first MiB.
type Formatter interface {
	Format(ctx context.Context, fsType string, size int64, noise bool, write func(offset, length int64, data []byte) error) error
}

// A volumeDisk is the disk of a volume that outlives the pod.
type volumeDisk struct {
	vmpod.DiskRecord
	// HostDevice is a block device of this host that another driver has
	// published for the pod; VolumeID is its path in the pod's directory then.
	HostDevice string `json:"hostDevice,omitempty"`
	// Made is set once the guest has the volume.
	Made bool `json:"made,omitempty"`
}

// serial is the disk's ID in the machine.
func (d *volumeDisk) serial() string { return storage.DiskID(d.VolumeID) }

// diskVolume is the volume of a record, which lies at hostPath.
func diskVolume(rec vmpod.VolumeRecord, hostPath string) (*volume, error) {
	if rec.Disk == nil {
		return nil, refuse("host_path", fmt.Sprintf("the record of volume %s names no disk", hostPath))
	}
	d := &volumeDisk{DiskRecord: *rec.Disk}
	if err := d.Check(); err != nil {
		return nil, err
	}
	if d.FSType == "" && !d.Block {
		d.FSType = "ext4"
	}
	return &volume{ID: "disk-" + d.serial(), Kind: agentapi.AddVolumeRequest_DISK, HostPath: hostPath, FSGroup: rec.FSGroup, Disk: d}, nil
}

// holder is under which name the pod's VM has disks.
func (s *Server) holder(vm vmpod.ID) storage.Holder {
	return storage.Holder{VM: vm.String(), Host: s.config.NodeName}
}

// checkGuestHasDisks refuses a disk to a guest that would take it for something
// else.
func (p *pod) checkGuestHasDisks(d *volumeDisk) error {
	sb, _ := p.s.store.sandbox(p.id)
	switch {
	case sb == nil || !slices.Contains(sb.Features, agentapi.FeatureDisks):
		return fmt.Errorf("the pod's VM was started by an older version, which cannot mount disks: delete the pod, so that it gets a new one: %w", errdefs.ErrFailedPrecondition)
	case d.FSType == "xfs" && !slices.Contains(sb.Features, agentapi.FeatureXFS):
		return fmt.Errorf("the guest's kernel has no xfs: use ext4, or another kernel (`make guest-kernel`): %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}

// ensureDisk has the guest mount the disk of a volume. What it does is recorded
// before it is done, so that the sandbox's end takes it back however far it
// came; and each step may be repeated, so that the next call goes on. The pod is
// locked.
func (p *pod) ensureDisk(ctx context.Context, v volume) error {
	if err := p.checkGuestHasDisks(v.Disk); err != nil {
		return err
	}
	if err := p.noteVolume(v); err != nil {
		return err
	}
	failpoint.Hit(failpoint.DiskNoted)
	disk, err := p.openDisk(ctx, v.Disk)
	if err != nil {
		return err
	}
	failpoint.Hit(failpoint.DiskAttached)
	plugger, ok := p.machine.(vmpod.Plugger)
	if !ok {
		return fmt.Errorf("this hypervisor cannot add disks to a running VM: %w", errdefs.ErrNotImplemented)
	}
	if err := plugger.Plug(ctx, vmpod.Device{Disk: &disk}); err != nil {
		return step("plug the disk", err)
	}
	failpoint.Hit(failpoint.DiskPlugged)
	if err := p.mountDisk(ctx, v, disk); err != nil {
		return err
	}
	failpoint.Hit(failpoint.DiskMounted)
	made := *v.Disk
	made.Made = true
	v.Disk = &made
	p.mu.Lock()
	p.volumes[v.ID] = &liveVolume{pod: p, volume: v}
	p.mu.Unlock()
	err = p.noteVolume(v)
	failpoint.Hit(failpoint.DiskRecorded)
	return err
}

// noteVolume records a volume.
func (p *pod) noteVolume(v volume) error {
	return p.s.store.updateSandbox(p.id, noEvent, func(sb *sandbox) {
		sb.Volumes = append(slices.DeleteFunc(slices.Clone(sb.Volumes), func(o volume) bool { return o.ID == v.ID }), v)
	})
}

// openDisk takes hold of a disk for this pod's VM alone.
func (p *pod) openDisk(ctx context.Context, d *volumeDisk) (vmpod.Disk, error) {
	if d.HostDevice != "" {
		return vmpod.Disk{ID: d.serial(), Path: d.HostDevice, ReadOnly: d.ReadOnly}, nil
	}
	if p.s.config.Disks == nil {
		return vmpod.Disk{}, fmt.Errorf("volume %s: the node has no datastores: %w", d.VolumeID, errdefs.ErrFailedPrecondition)
	}
	a, err := p.s.config.Disks.Attach(ctx, d.VolumeID, p.s.holder(p.vm), storage.AttachOptions{ReadOnly: d.ReadOnly})
	if err != nil {
		return vmpod.Disk{}, err
	}
	disk := vmpod.Disk{
		ID: a.DiskID, Path: a.Path, Format: a.Format, ReadOnly: a.ReadOnly,
		Volume: &vmpod.Volume{ID: a.VolumeID, Thick: a.Thick, IOPS: a.IOPS, BytesPerSecond: a.BytesPerSecond, Key: a.Key},
	}
	for _, b := range a.Backing {
		disk.Volume.Backing = append(disk.Volume.Backing, vmpod.DiskFile{Path: b.Path, Format: b.Format})
	}
	return disk, nil
}

// mountDisk has the guest use a disk that is plugged, sending it an empty file
// system if the disk is blank.
func (p *pod) mountDisk(ctx context.Context, v volume, disk vmpod.Disk) error {
	req := &agentapi.AddVolumeRequest{Id: v.ID, Kind: v.Kind, Disk: &agentapi.VolumeDisk{
		Serial: disk.ID, FsType: v.Disk.FSType, Options: v.Disk.Options, ReadOnly: v.Disk.ReadOnly, Block: v.Disk.Block,
		FsGroupOnRootMismatch: v.Disk.FSGroupChangePolicy == vmpod.FSGroupOnRootMismatch, Noise: disk.Format == storage.FormatLUKS,
	}}
	if v.FSGroup != nil {
		req.HasFsGroup, req.FsGroup = true, *v.FSGroup
	}
	for formatted := false; ; formatted = true {
		resp, err := call(ctx, p.link, agentapi.AgentService.AddVolume, req)
		if err != nil || !resp.GetBlank() {
			return err
		}
		if formatted {
			return fmt.Errorf("disk %s is blank after it was formatted: %w", disk.ID, errdefs.ErrDataLoss)
		}
		if err := p.formatDisk(ctx, v, resp.GetBytes(), req.Disk.Noise); err != nil {
			return err
		}
		p.log.Info("a blank volume has a file system now", "volume", v.Disk.VolumeID, "fs_type", v.Disk.FSType, "bytes", resp.GetBytes())
		failpoint.Hit(failpoint.DiskFilled)
	}
}

// formatDisk sends the guest the file system of a blank disk.
func (p *pod) formatDisk(ctx context.Context, v volume, size int64, noise bool) error {
	if p.s.config.Formatter == nil {
		return fmt.Errorf("volume %s is blank, and nothing here makes file systems: %w", v.Disk.VolumeID, errdefs.ErrNotImplemented)
	}
	for try := 0; ; try++ {
		c, err := p.link.session(ctx)
		if err != nil {
			return err
		}
		if err = p.sendFileSystem(ctx, c, v, size, noise); err == nil {
			return nil
		}
		if try > 0 || c.Err() == nil || ctx.Err() != nil {
			return err
		}
	}
}

func (p *pod) sendFileSystem(ctx context.Context, c *agentapi.Client, v volume, size int64, noise bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r, w := io.Pipe()
	made := make(chan error, 1)
	go func() {
		err := p.s.config.Formatter.Format(ctx, v.Disk.FSType, size, noise, func(at, length int64, data []byte) error {
			return agentapi.WriteExtent(w, agentapi.Extent{Offset: at, Length: length, Data: data})
		})
		w.CloseWithError(err) // io.EOF, the orderly end, if it is nil
		made <- err
	}()
	err := c.Format(ctx, v.ID, r)
	r.CloseWithError(errUnwanted)
	cancel()
	if failed := <-made; failed != nil && !errors.Is(failed, errUnwanted) && !errors.Is(failed, context.Canceled) {
		return failed // why nothing was sent
	}
	return err
}

var errUnwanted = errors.New("the guest takes no more")

// forgetDisks drops what has no machine any more: other VMs may have the disks
// of vm now. It is called when vm is off, and may be repeated.
func (s *Server) forgetDisks(ctx context.Context, vm vmpod.ID, ids []string) error {
	if s.config.Disks == nil {
		return nil
	}
	var errs []error
	for _, id := range ids {
		errs = append(errs, step("detach volume "+id, s.config.Disks.Detach(ctx, id, s.holder(vm))))
		failpoint.Hit(failpoint.DiskDetached)
	}
	return errors.Join(errs...)
}

// diskIDs are the volumes that a sandbox may hold.
func (sb *sandbox) diskIDs() []string {
	var ids []string
	for _, v := range sb.Volumes {
		if v.Disk != nil && v.Disk.HostDevice == "" {
			ids = append(ids, v.Disk.VolumeID)
		}
	}
	return ids
}

// disksOf are the volumes that a machine has.
func disksOf(m vmpod.Machine) []string {
	var ids []string
	for _, d := range m.Spec().Disks {
		if d.Volume != nil {
			ids = append(ids, d.Volume.ID)
		}
	}
	return ids
}

const (
	// letGoTimeout bounds one attempt to have a guest write what it has and
	// unmount its disks.
	letGoTimeout = 90 * time.Second
	// letGoPatience is for how long a sandbox is not stopped because of it: what
	// was not synced by the pod is lost then, as by a power cut.
	letGoPatience = 5 * time.Minute
)

// letGoOfDisks has the guest unmount the disks, so that all that was written is
// on them, before its machine is stopped. An error means that the guest is still
// at it. Containers are killed by now; the pod is locked.
func (p *pod) letGoOfDisks(ctx context.Context, sb *sandbox) error {
	if !slices.ContainsFunc(sb.Volumes, func(v volume) bool { return v.Disk != nil && v.Disk.Made }) {
		return nil
	}
	if p.letGoSince.IsZero() {
		p.letGoSince = time.Now()
	}
	ctx, cancel := context.WithTimeout(ctx, letGoTimeout)
	defer cancel()
	defer context.AfterFunc(p.link.ctx, cancel)()
	err := p.unmountDisks(ctx, sb)
	switch {
	case err == nil:
		failpoint.Hit(failpoint.DiskUnmounted)
		return nil
	case isClosed(p.dead), p.link.ctx.Err() != nil, p.link.holding() != nil, time.Since(p.letGoSince) > letGoPatience:
		p.log.Warn("a pod VM ends without having unmounted its volumes; what it had not synced may be lost", "err", err)
		return nil
	}
	return step("unmount the volumes", err)
}

func (p *pod) unmountDisks(ctx context.Context, sb *sandbox) error {
	if err := p.link.holding(); err != nil {
		return err
	}
	for _, c := range p.s.store.containersOf(p.id) {
		_, err := call(ctx, p.link, agentapi.AgentService.RemoveContainer, &agentapi.RemoveContainerRequest{Id: c.ID})
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	for _, v := range sb.Volumes {
		if v.Disk == nil {
			continue
		}
		_, err := call(ctx, p.link, agentapi.AgentService.RemoveVolume, &agentapi.RemoveVolumeRequest{Id: v.ID})
		if errdefs.IsDataLoss(err) {
			p.log.Error("a volume was unmounted, but not all that was written to it is there", "volume", v.Disk.VolumeID, "err", err)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// ExpandVolume makes the device of a volume that has grown, and the file system
// on it, as large as the volume. hostDir is as in VolumeUsage, and so is
// ErrNotFound: the file system then grows when it is next mounted.
func (s *Server) ExpandVolume(ctx context.Context, podUID, hostDir string, bytes int64) error {
	for _, sb := range s.store.sandboxesOfPod(podUID) {
		p := s.livePod(sb.ID)
		v := sb.volumeAt(hostDir)
		if p == nil || v == nil || v.Disk == nil || !v.Disk.Made {
			continue
		}
		resizer, ok := p.machine.(vmpod.DiskResizer)
		if !ok {
			return fmt.Errorf("volume %s: this hypervisor cannot resize the disks of a running VM: delete the pod, so that it gets a new one: %w", v.Disk.VolumeID, errdefs.ErrNotImplemented)
		}
		if err := resizer.ResizeDisk(ctx, v.Disk.serial(), bytes); err != nil {
			return fmt.Errorf("resize the disk of volume %s: %w", v.Disk.VolumeID, err)
		}
		failpoint.Hit(failpoint.DiskResized)
		_, err := call(ctx, p.link, agentapi.AgentService.ExpandVolume, &agentapi.ExpandVolumeRequest{Id: v.ID, Bytes: bytes})
		return err
	}
	return fmt.Errorf("volume %s of pod %s is in no running guest: %w", hostDir, podUID, errdefs.ErrNotFound)
}

// volumeAt finds the volume that the kubelet believes to be at a path.
func (sb *sandbox) volumeAt(hostDir string) *volume {
	hostDir = filepath.Clean(hostDir)
	for i, v := range sb.Volumes {
		if _, ok := below(v.HostPath, hostDir); ok && v.HostPath != "" {
			return &sb.Volumes[i]
		}
	}
	return nil
}
