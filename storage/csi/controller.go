package csi

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/openatoll/atoll/storage"
)

// Parameters of a StorageClass.
const (
	// ParameterPolicy names one of the back end's policies.
	ParameterPolicy = "policy"
	// ParameterPolicyID is the policy's ID, as vSphere's own CSI driver has it.
	ParameterPolicyID = "storagePolicyID"
	// parameterPrefix is of what the provisioner adds.
	parameterPrefix = "csi.storage.k8s.io/"
)

// labelParameters are what the provisioner tells about the claim.
var labelParameters = map[string]string{
	parameterPrefix + "pvc/name":      storage.LabelPVC,
	parameterPrefix + "pvc/namespace": storage.LabelNamespace,
	parameterPrefix + "pv/name":       storage.LabelPV,
}

// ControllerGetCapabilities implements csi.ControllerServer.
func (d *Driver) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	resp := &csi.ControllerGetCapabilitiesResponse{}
	for _, t := range []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
		csi.ControllerServiceCapability_RPC_GET_VOLUME,
		csi.ControllerServiceCapability_RPC_GET_CAPACITY,
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
		csi.ControllerServiceCapability_RPC_GET_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	} {
		resp.Capabilities = append(resp.Capabilities, &csi.ControllerServiceCapability{
			Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}},
		})
	}
	return resp, nil
}

// A policyFinder is a storage.Disks that finds policies by their IDs itself, also
// those that Policies does not show yet.
type policyFinder interface {
	PolicyByID(ctx context.Context, id string) (storage.Policy, error)
}

// policyOf finds the policy that a class's parameters name.
func (d *Driver) policyOf(ctx context.Context, parameters map[string]string) (string, error) {
	for _, k := range slices.Sorted(maps.Keys(parameters)) {
		if k != ParameterPolicy && k != ParameterPolicyID && !strings.HasPrefix(k, parameterPrefix) {
			return "", invalid("parameter %q is not known: a class of %s has %s or %s", k, Name, ParameterPolicy, ParameterPolicyID)
		}
	}
	name, id := parameters[ParameterPolicy], parameters[ParameterPolicyID]
	switch {
	case name != "" && id != "":
		return "", invalid("parameters %s and %s exclude each other: remove one", ParameterPolicy, ParameterPolicyID)
	case name != "":
		return name, nil
	case id == "" && d.config.DefaultPolicy != "":
		return d.config.DefaultPolicy, nil
	case id == "":
		return "", invalid("the class names no policy: set parameter %s", ParameterPolicy)
	}
	if finder, ok := d.disks.(policyFinder); ok {
		p, err := finder.PolicyByID(ctx, id)
		return p.Name, err
	}
	policies, err := d.disks.Policies(ctx)
	if err != nil {
		return "", err
	}
	i := slices.IndexFunc(policies, func(p storage.Policy) bool { return p.ID == id })
	if i < 0 {
		return "", fmt.Errorf("no policy has the id %s here: %w", id, errdefs.ErrNotFound)
	}
	return policies[i].Name, nil
}

// claimOf is the claim that a request makes.
func (d *Driver) claimOf(ctx context.Context, req *csi.CreateVolumeRequest) (c storage.Claim, err error) {
	switch {
	case req.GetName() == "":
		return c, invalid("name is required")
	case len(req.GetSecrets()) > 0:
		return c, invalid("volume %s: secrets are not used, the store of an encrypted volume has its own key: remove them from the class", req.Name)
	case len(req.GetMutableParameters()) > 0:
		return c, invalid("volume %s: a policy cannot be changed: use no VolumeAttributesClass", req.Name)
	}
	if err := checkCapabilities(req.GetVolumeCapabilities()); err != nil {
		return c, err
	}
	size := req.GetCapacityRange()
	if err := checkRange(size); err != nil {
		return c, err
	}
	c = storage.Claim{Name: shortName(req.Name), Bytes: size.GetRequiredBytes(), Labels: map[string]string{}}
	if c.Policy, err = d.policyOf(ctx, req.GetParameters()); errdefs.IsNotFound(err) {
		// NotFound would mean the source of the volume.
		return c, invalid("volume %s: %v", req.Name, err)
	} else if err != nil {
		return c, err
	}
	for k, label := range labelParameters {
		if v := req.Parameters[k]; v != "" {
			c.Labels[label] = v
		}
	}
	if c.At, err = d.wanted(ctx, req.GetAccessibilityRequirements()); err != nil {
		return c, err
	}
	if c.Source, err = sourceOf(req.GetVolumeContentSource()); err != nil {
		return c, err
	}
	if c.Bytes == 0 && c.Source == nil {
		c.Bytes = defaultBytes
		if limit := size.GetLimitBytes(); limit > 0 && limit < c.Bytes {
			c.Bytes = limit
		}
	}
	return c, nil
}

// plainName is what the store takes as a name.
var plainName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// shortName is the name of a volume or snapshot in the store: CSI's may have 128
// characters, any at all.
func shortName(name string) string {
	if plainName.MatchString(name) {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return "h-" + hex.EncodeToString(sum[:20])
}

// defaultBytes is the size of a volume that is asked for without one.
const defaultBytes = 1 << 30

func sourceOf(s *csi.VolumeContentSource) (*storage.Source, error) {
	switch t := s.GetType().(type) {
	case nil:
		return nil, nil
	case *csi.VolumeContentSource_Snapshot:
		if id := t.Snapshot.GetSnapshotId(); id != "" {
			return &storage.Source{SnapshotID: id}, nil
		}
	case *csi.VolumeContentSource_Volume:
		if id := t.Volume.GetVolumeId(); id != "" {
			return &storage.Source{VolumeID: id}, nil
		}
	}
	return nil, invalid("volume_content_source names neither a snapshot nor a volume")
}

func checkRange(r *csi.CapacityRange) error {
	switch {
	case r.GetRequiredBytes() < 0 || r.GetLimitBytes() < 0:
		return invalid("capacity_range is negative")
	case r.GetLimitBytes() > 0 && r.GetLimitBytes() < r.GetRequiredBytes():
		return invalid("capacity_range: limit_bytes %d is below required_bytes %d", r.LimitBytes, r.RequiredBytes)
	case r.GetLimitBytes() > 0 && r.GetLimitBytes()>>20<<20 < r.GetRequiredBytes():
		return status.Errorf(codes.OutOfRange, "sizes are whole MiB, and none lies between the %d and %d bytes of capacity_range", r.RequiredBytes, r.LimitBytes)
	}
	return nil
}

// CreateVolume implements csi.ControllerServer.
func (d *Driver) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	claim, err := d.claimOf(ctx, req)
	if err != nil {
		return nil, err
	}
	v, err := d.disks.Create(ctx, claim)
	if err != nil {
		return nil, createError(err, claim)
	}
	if limit := req.GetCapacityRange().GetLimitBytes(); limit > 0 && v.Bytes > limit {
		return nil, status.Errorf(codes.AlreadyExists, "volume %s is there and has %d bytes, which is above the limit of %d", claim.Name, v.Bytes, limit)
	}
	return &csi.CreateVolumeResponse{Volume: d.volume(v, req.GetVolumeContentSource())}, nil
}

// createError: a policy that is unknown is no source that is missing, which is
// what NotFound says.
func createError(err error, c storage.Claim) error {
	if errdefs.IsNotFound(err) && c.Source == nil {
		return invalid("%v", err)
	}
	return err
}

func (d *Driver) volume(v storage.Volume, source *csi.VolumeContentSource) *csi.Volume {
	return &csi.Volume{
		VolumeId: v.ID, CapacityBytes: v.Bytes, ContentSource: source, AccessibleTopology: topologyOf(v.At),
		VolumeContext: map[string]string{"policy": v.Policy, "datastore": v.Datastore},
	}
}

// DeleteVolume implements csi.ControllerServer.
func (d *Driver) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	if req.GetVolumeId() == "" {
		return nil, invalid("volume_id is required")
	}
	// An ID that was never ours is no error: it is gone.
	if err := d.disks.Delete(ctx, req.VolumeId); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
		return nil, err
	}
	return &csi.DeleteVolumeResponse{}, nil
}

// get finds a volume; an ID that none can have is one that is not there.
func (d *Driver) get(ctx context.Context, id string) (storage.Volume, error) {
	if id == "" {
		return storage.Volume{}, invalid("volume_id is required")
	}
	v, err := d.disks.Get(ctx, id)
	if errdefs.IsInvalidArgument(err) {
		return v, status.Error(codes.NotFound, err.Error())
	}
	return v, err
}

// ValidateVolumeCapabilities implements csi.ControllerServer.
func (d *Driver) ValidateVolumeCapabilities(ctx context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if req.GetVolumeId() == "" || len(req.GetVolumeCapabilities()) == 0 {
		return nil, invalid("volume_id and volume_capabilities are required")
	}
	if _, err := d.get(ctx, req.VolumeId); err != nil {
		return nil, err
	}
	if err := checkCapabilities(req.VolumeCapabilities); err != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: status.Convert(toGRPC(err)).Message()}, nil
	}
	return &csi.ValidateVolumeCapabilitiesResponse{Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
		VolumeContext: req.GetVolumeContext(), VolumeCapabilities: req.VolumeCapabilities, Parameters: req.GetParameters(),
	}}, nil
}

// ControllerGetVolume implements csi.ControllerServer.
func (d *Driver) ControllerGetVolume(ctx context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	v, err := d.get(ctx, req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{Volume: d.volume(v, nil), Status: &csi.ControllerGetVolumeResponse_VolumeStatus{}}, nil
}

// ListVolumes implements csi.ControllerServer. What cannot be read is left out,
// unless nothing could be read.
func (d *Driver) ListVolumes(ctx context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	all, err := d.disks.List(ctx)
	if err != nil && (len(all) == 0 || errors.Is(err, ctx.Err())) {
		return nil, err
	}
	page, next, err := paged(all, func(v storage.Volume) string { return v.ID }, req.GetStartingToken(), req.GetMaxEntries())
	if err != nil {
		return nil, err
	}
	resp := &csi.ListVolumesResponse{NextToken: next}
	for _, v := range page {
		resp.Entries = append(resp.Entries, &csi.ListVolumesResponse_Entry{Volume: d.volume(v, nil)})
	}
	return resp, nil
}

// tokenPrefix and an ID are the token for what comes behind it, whether that
// one is still there or not.
const tokenPrefix = "after."

// paged cuts a list that is sorted by ID.
func paged[T any](all []T, id func(T) string, token string, limit int32) (page []T, next string, err error) {
	if limit < 0 {
		return nil, "", invalid("max_entries is negative")
	}
	if token != "" {
		after, ok := strings.CutPrefix(token, tokenPrefix)
		if !ok {
			return nil, "", status.Errorf(codes.Aborted, "starting_token %q is not one of this driver's: list from the beginning", token)
		}
		all = slices.DeleteFunc(slices.Clone(all), func(t T) bool { return id(t) <= after })
	}
	if limit > 0 && len(all) > int(limit) {
		all = all[:limit]
		next = tokenPrefix + id(all[limit-1])
	}
	return all, next, nil
}

// GetCapacity implements csi.ControllerServer. Where a policy is not known there
// is no room for it.
func (d *Driver) GetCapacity(ctx context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	if len(req.GetVolumeCapabilities()) > 0 && checkCapabilities(req.VolumeCapabilities) != nil {
		return &csi.GetCapacityResponse{}, nil
	}
	policy, err := d.policyOf(ctx, req.GetParameters())
	if errdefs.IsNotFound(err) {
		return &csi.GetCapacityResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	at := []storage.Topology{{}}
	if t := req.GetAccessibleTopology(); t != nil {
		ids, err := d.datastoreIDs(ctx)
		if err != nil {
			return nil, err
		}
		if at = places(t, ids); len(at) == 0 {
			at = []storage.Topology{{}}
		}
	}
	return d.capacity(ctx, policy, at)
}

// capacity is the largest of several places: a volume lies in one of them.
func (d *Driver) capacity(ctx context.Context, policy string, at []storage.Topology) (*csi.GetCapacityResponse, error) {
	var best storage.Capacity
	for _, t := range at {
		c, err := d.disks.Capacity(ctx, policy, t)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if c.MaxVolume > best.MaxVolume {
			best = c
		}
	}
	resp := &csi.GetCapacityResponse{AvailableCapacity: best.Available}
	resp.MaximumVolumeSize = wrap(best.MaxVolume)
	return resp, nil
}

// ControllerExpandVolume implements csi.ControllerServer.
func (d *Driver) ControllerExpandVolume(ctx context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	v, err := d.expand(ctx, req.GetVolumeId(), req.GetCapacityRange(), req.GetVolumeCapability())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: v.Bytes, NodeExpansionRequired: true}, nil
}

func (d *Driver) expand(ctx context.Context, id string, r *csi.CapacityRange, c *csi.VolumeCapability) (storage.Volume, error) {
	if id == "" || r == nil {
		return storage.Volume{}, invalid("volume_id and capacity_range are required")
	}
	if err := checkRange(r); err != nil {
		return storage.Volume{}, err
	}
	if c != nil {
		if err := checkCapability(c); err != nil {
			return storage.Volume{}, err
		}
	}
	v, err := d.get(ctx, id)
	if err != nil || v.Bytes >= r.GetRequiredBytes() {
		return v, err
	}
	return d.disks.Expand(ctx, id, r.GetRequiredBytes())
}
