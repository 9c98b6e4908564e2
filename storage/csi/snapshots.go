package csi

import (
	"context"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/openatoll/atoll/storage"
)

// snapshotParameters are what the snapshotter tells about the VolumeSnapshot.
var snapshotParameters = map[string]string{
	parameterPrefix + "volumesnapshot/name":        "volumesnapshot-name",
	parameterPrefix + "volumesnapshot/namespace":   "volumesnapshot-namespace",
	parameterPrefix + "volumesnapshotcontent/name": "volumesnapshotcontent-name",
}

// CreateSnapshot implements csi.ControllerServer.
func (d *Driver) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	if req.GetName() == "" || req.GetSourceVolumeId() == "" {
		return nil, invalid("name and source_volume_id are required")
	}
	labels := map[string]string{}
	for k, v := range req.GetParameters() {
		label, known := snapshotParameters[k]
		if !known {
			return nil, invalid("parameter %q is not known: a snapshot class of %s has none", k, Name)
		}
		labels[label] = v
	}
	s, err := d.disks.Snapshot(ctx, req.SourceVolumeId, shortName(req.Name), labels)
	if err != nil {
		return nil, err
	}
	return &csi.CreateSnapshotResponse{Snapshot: snapshot(s)}, nil
}

func snapshot(s storage.Snapshot) *csi.Snapshot {
	return &csi.Snapshot{
		SnapshotId: s.ID, SourceVolumeId: s.VolumeID, SizeBytes: s.Bytes,
		CreationTime: timestamppb.New(s.CreatedAt), ReadyToUse: s.Ready,
	}
}

// DeleteSnapshot implements csi.ControllerServer.
func (d *Driver) DeleteSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	if req.GetSnapshotId() == "" {
		return nil, invalid("snapshot_id is required")
	}
	if err := d.disks.DeleteSnapshot(ctx, req.SnapshotId); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
		return nil, err
	}
	return &csi.DeleteSnapshotResponse{}, nil
}

// GetSnapshot implements csi.ControllerServer.
func (d *Driver) GetSnapshot(ctx context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	if req.GetSnapshotId() == "" {
		return nil, invalid("snapshot_id is required")
	}
	s, err := d.disks.GetSnapshot(ctx, req.SnapshotId)
	if err != nil {
		return nil, err
	}
	return &csi.GetSnapshotResponse{Snapshot: snapshot(s)}, nil
}

// ListSnapshots implements csi.ControllerServer. A snapshot or a volume that is
// not there has none.
func (d *Driver) ListSnapshots(ctx context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	all, err := d.snapshots(ctx, req)
	if err != nil {
		return nil, err
	}
	page, next, err := paged(all, func(s storage.Snapshot) string { return s.ID }, req.GetStartingToken(), req.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	resp := &csi.ListSnapshotsResponse{NextToken: next}
	for _, s := range page {
		resp.Entries = append(resp.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: snapshot(s)})
	}
	return resp, nil
}

func (d *Driver) snapshots(ctx context.Context, req *csi.ListSnapshotsRequest) ([]storage.Snapshot, error) {
	absent := func(err error) bool { return errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) }
	if id := req.GetSnapshotId(); id != "" {
		s, err := d.disks.GetSnapshot(ctx, id)
		if absent(err) || err == nil && req.GetSourceVolumeId() != "" && s.VolumeID != req.SourceVolumeId {
			return nil, nil
		}
		return []storage.Snapshot{s}, err
	}
	all, err := d.disks.ListSnapshots(ctx, req.GetSourceVolumeId())
	if absent(err) || err != nil && len(all) > 0 && ctx.Err() == nil {
		err = nil
	}
	return all, err
}

func wrap(n int64) *wrapperspb.Int64Value { return wrapperspb.Int64(n) }
