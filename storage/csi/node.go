package csi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
)

// published remembers where a volume was published last.
type published struct {
	mu      sync.Mutex
	targets map[string]string // by volume ID
}

func (p *published) note(volumeID, target string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.targets == nil {
		p.targets = map[string]string{}
	}
	p.targets[volumeID] = target
}

// forget drops the volumes that were published at a target.
func (p *published) forget(target string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	maps.DeleteFunc(p.targets, func(_, t string) bool { return t == target })
}

func (p *published) target(volumeID string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.targets[volumeID]
}

// NodeGetCapabilities implements csi.NodeServer. There is nothing to stage: a
// volume has one user at a time.
func (d *Driver) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	resp := &csi.NodeGetCapabilitiesResponse{}
	for _, t := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
		csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP,
	} {
		resp.Capabilities = append(resp.Capabilities, &csi.NodeServiceCapability{
			Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}},
		})
	}
	return resp, nil
}

// NodeGetInfo implements csi.NodeServer.
func (d *Driver) NodeGetInfo(ctx context.Context, _ *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	t, err := d.nodeTopology(ctx)
	if err != nil {
		return nil, err
	}
	return &csi.NodeGetInfoResponse{NodeId: d.config.NodeName, MaxVolumesPerNode: d.config.MaxVolumes, AccessibleTopology: t}, nil
}

// recordOf is what the guest must do with the volume.
func recordOf(volumeID string, req *csi.NodePublishVolumeRequest) (vmpod.VolumeRecord, error) {
	c := req.VolumeCapability
	r := vmpod.VolumeRecord{Kind: vmpod.VolumeDisk, Disk: &vmpod.DiskRecord{
		VolumeID: volumeID, Block: isBlock(c), ReadOnly: req.GetReadonly() || isReader(c),
	}}
	if m := c.GetMount(); m != nil {
		r.Disk.FSType = m.GetFsType()
		// "ro" is made true at the device, too.
		r.Disk.ReadOnly = r.Disk.ReadOnly || slices.Contains(m.GetMountFlags(), "ro")
		r.Disk.Options = m.GetMountFlags()
		if g := m.GetVolumeMountGroup(); g != "" {
			n, err := strconv.ParseInt(g, 10, 64)
			if err != nil || n < 0 {
				return r, invalid("volume_mount_group %q is no group's number", g)
			}
			r.FSGroup = &n
		}
	}
	return r, r.Disk.Check()
}

// NodePublishVolume writes the record of a volume to where the kubelet wants it.
func (d *Driver) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	target := req.GetTargetPath()
	if req.GetVolumeId() == "" || target == "" {
		return nil, invalid("volume_id and target_path are required")
	}
	if !filepath.IsAbs(target) {
		return nil, invalid("target_path %q is not absolute", target)
	}
	if err := checkCapability(req.GetVolumeCapability()); err != nil {
		return nil, err
	}
	unlock, err := d.targets.Lock(ctx, target)
	if err != nil {
		return nil, err
	}
	defer unlock()
	v, err := d.toPublish(ctx, req)
	if err != nil {
		return nil, err
	}
	record, err := recordOf(v.ID, req)
	if err != nil {
		return nil, err
	}
	if err := d.alone(v.ID, target, req.VolumeCapability); err != nil {
		return nil, err
	}
	publish := publishMount
	if record.Disk.Block {
		publish = publishBlock
	}
	if err := publish(target, record); err != nil {
		return nil, err
	}
	d.published.note(v.ID, target)
	return &csi.NodePublishVolumeResponse{}, nil
}

// alone refuses a second target to a volume of one pod, with the reason, long
// before storage.Attacher would. What was published before this process started
// is not known here.
func (d *Driver) alone(volumeID, target string, c *csi.VolumeCapability) error {
	if c.GetAccessMode().GetMode() != csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER {
		return nil
	}
	other := d.published.target(volumeID)
	if other == "" || other == target {
		return nil
	}
	if r, err := publishedRecord(other); err != nil || r.Disk.VolumeID != volumeID {
		return nil
	}
	return status.Errorf(codes.FailedPrecondition, "volume %s is ReadWriteOncePod and published at %s for pod %s: delete that pod first", volumeID, other, podOf(other))
}

// toPublish is the volume to publish: one that is there, or one that is made
// for the pod.
func (d *Driver) toPublish(ctx context.Context, req *csi.NodePublishVolumeRequest) (storage.Volume, error) {
	if req.GetVolumeContext()[contextEphemeral] == "true" {
		return d.createInline(ctx, req)
	}
	v, err := d.get(ctx, req.VolumeId)
	if err != nil {
		return v, err
	}
	if v.At.Host != "" && v.At.Host != d.config.NodeName {
		return v, fmt.Errorf("volume %s is on host %s, and cannot be reached from %s: let the scheduler choose the pod's node: %w", v.ID, v.At.Host, d.config.NodeName, errdefs.ErrFailedPrecondition)
	}
	return v, nil
}

func publishMount(target string, want vmpod.VolumeRecord) error {
	have, ok, err := vmpod.ReadVolumeRecord(target)
	if err != nil {
		return err
	}
	if ok {
		return sameRecord(target, have, want)
	}
	if err := os.MkdirAll(target, 0o750); err != nil {
		return err
	}
	return vmpod.WriteVolumeRecord(target, want)
}

func publishBlock(target string, want vmpod.VolumeRecord) error {
	have, ok, err := vmpod.ReadBlockRecord(target)
	if err != nil {
		return err
	}
	if ok {
		return sameRecord(target, have, want)
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o750); err != nil {
		return err
	}
	return vmpod.WriteBlockRecord(target, want)
}

// sameRecord: what a target has stays as it is. The policy of its group is
// spherelet's to add.
func sameRecord(target string, have, want vmpod.VolumeRecord) error {
	if have.Disk != nil {
		want.Disk.FSGroupChangePolicy = have.Disk.FSGroupChangePolicy
	}
	if reflect.DeepEqual(have, want) {
		return nil
	}
	return status.Errorf(codes.AlreadyExists, "%s has a volume published otherwise: unpublish that first", target)
}

// NodeUnpublishVolume takes the record away. The VM has given the disk back by
// then, or does so when it ends.
func (d *Driver) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	target := req.GetTargetPath()
	if req.GetVolumeId() == "" || target == "" {
		return nil, invalid("volume_id and target_path are required")
	}
	unlock, err := d.targets.Lock(ctx, target)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := d.deleteInline(ctx, req.VolumeId); err != nil {
		return nil, err
	}
	if err := unpublish(target); err != nil {
		return nil, err
	}
	d.published.forget(target)
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// unpublish removes a record and nothing else.
func unpublish(target string) error {
	fi, err := os.Lstat(target)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return vmpod.RemoveBlockRecord(target)
	case err != nil:
		return err
	case !fi.IsDir():
		if _, ok, err := vmpod.ReadBlockRecord(target); err != nil || !ok {
			return fmt.Errorf("%s is no record of a volume, and is left as it is: %w", target, errors.Join(err, errdefs.ErrFailedPrecondition))
		}
		return vmpod.RemoveBlockRecord(target)
	}
	if err := vmpod.RemoveVolumeRecord(target); err != nil {
		return err
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s has more in it than the record of a volume: %w", target, err)
	}
	return nil
}

// publishedRecord reads the record at a path of the kubelet.
func publishedRecord(path string) (vmpod.VolumeRecord, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return vmpod.VolumeRecord{}, status.Errorf(codes.NotFound, "%s: no volume is published there", path)
	}
	read := vmpod.ReadBlockRecord
	if fi.IsDir() {
		read = vmpod.ReadVolumeRecord
	}
	r, ok, err := read(path)
	if err == nil && (!ok || r.Disk == nil) {
		err = status.Errorf(codes.NotFound, "%s: no volume is published there", path)
	}
	return r, err
}

// NodeGetVolumeStats asks the guest. Of a raw volume the size is known without
// it.
func (d *Driver) NodeGetVolumeStats(ctx context.Context, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	path := req.GetVolumePath()
	if req.GetVolumeId() == "" || path == "" {
		return nil, invalid("volume_id and volume_path are required")
	}
	v, err := d.inline(ctx, req.VolumeId)
	if err != nil {
		return nil, err
	}
	record, err := publishedRecord(path)
	if err != nil {
		return nil, err
	}
	if record.Disk.VolumeID != v.ID {
		return nil, status.Errorf(codes.NotFound, "%s has volume %s, not %s", path, record.Disk.VolumeID, v.ID)
	}
	if record.Disk.Block {
		return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: v.Bytes}}}, nil
	}
	u, err := d.config.Guest.VolumeUsage(ctx, podOf(path), path)
	if errdefs.IsNotFound(err) {
		// NotFound would say that the volume is gone.
		return nil, status.Errorf(codes.Unavailable, "volume %s is not mounted in a guest yet", v.ID)
	}
	if err != nil {
		return nil, err
	}
	return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{
		{Unit: csi.VolumeUsage_BYTES, Total: int64(u.CapacityBytes), Used: int64(u.Bytes), Available: int64(u.AvailableBytes)},
		{Unit: csi.VolumeUsage_INODES, Total: int64(u.InodesCapacity), Used: int64(u.Inodes), Available: int64(u.InodesFree)},
	}}, nil
}

// NodeExpandVolume makes the disk's device and its file system as large as the
// volume. Where no VM has it, the guest that mounts it next does so.
func (d *Driver) NodeExpandVolume(ctx context.Context, req *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	path := req.GetVolumePath()
	if req.GetVolumeId() == "" || path == "" {
		return nil, invalid("volume_id and volume_path are required")
	}
	r := req.GetCapacityRange()
	if r == nil {
		r = &csi.CapacityRange{}
	}
	v, err := d.expand(ctx, req.VolumeId, r, req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	record, err := publishedRecord(path)
	if err != nil {
		return nil, err
	}
	if record.Disk.VolumeID != v.ID {
		return nil, status.Errorf(codes.NotFound, "%s has volume %s, not %s", path, record.Disk.VolumeID, v.ID)
	}
	if err := d.config.Guest.ExpandVolume(ctx, podOf(path), path, v.Bytes); err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	return &csi.NodeExpandVolumeResponse{CapacityBytes: v.Bytes}, nil
}

// podOf is the UID of the pod for which the kubelet has published a volume:
// …/pods/UID/volumes/… for a file system, …/publish/PV/UID for a device.
func podOf(path string) string {
	parts := strings.Split(filepath.Clean(path), "/")
	if i := slices.Index(parts, "pods"); i >= 0 && i+1 < len(parts) {
		return parts[i+1]
	}
	return parts[len(parts)-1]
}
