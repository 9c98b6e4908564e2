package csi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path"
	"runtime/debug"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/keylock"
	"github.com/openatoll/atoll/storage"
)

// Name is the driver's, in CSIDriver objects and StorageClasses.
const Name = v1alpha1.CSIDriverName

// A Guest answers for volumes that are in the VM of a pod.
type Guest interface {
	// VolumeUsage is what a volume takes in the guest; publishPath is where the
	// kubelet believes it to be. ErrNotFound while no VM of the pod has it.
	VolumeUsage(ctx context.Context, podUID, publishPath string) (storage.Usage, error)
	// ExpandVolume makes the device of a volume that has grown, and the file
	// system on it, as large as the volume. ErrNotFound while no VM of the pod
	// has it: the file system then grows when it is next mounted.
	ExpandVolume(ctx context.Context, podUID, publishPath string, bytes int64) error
}

// Config of a driver.
type Config struct {
	// Disks is where volumes are. Required.
	Disks storage.Disks
	// NodeName is the Kubernetes node whose node service this is; empty: there
	// is no node service.
	NodeName string
	// Zone of the node, if it is in one.
	Zone string
	// Guest is required with NodeName.
	Guest Guest
	// MaxVolumes is how many volumes the VMs of a node may have in all; 0: no
	// bound but what each VM has room for.
	MaxVolumes int64
	// DefaultPolicy is for classes that name none; empty: they must.
	DefaultPolicy string
	// Version is what GetPluginInfo tells.
	Version string
	// Logger; default slog.Default().
	Logger *slog.Logger
}

// A Driver serves CSI.
type Driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedControllerServer
	csi.UnimplementedNodeServer

	disks  storage.Disks
	config Config
	log    *slog.Logger

	targets   keylock.Locks[string] // paths at which something is done
	published published
}

// New returns the driver of a Config.
func New(c Config) (*Driver, error) {
	if c.Disks == nil || c.NodeName != "" && c.Guest == nil {
		return nil, fmt.Errorf("csi: Disks is required, and Guest with NodeName: %w", errdefs.ErrInvalidArgument)
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return &Driver{disks: c.Disks, config: c, log: c.Logger.With("component", "csi")}, nil
}

// Listen makes the unix socket, mode 0600, in place of one that a dead process
// has left.
func Listen(socket string) (net.Listener, error) {
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// stopTimeout is how long calls under way may take once Serve is to end.
const stopTimeout = 2 * time.Second

// Serve serves until ctx ends.
func (d *Driver) Serve(ctx context.Context, l net.Listener) error {
	s := grpc.NewServer(grpc.UnaryInterceptor(d.edge))
	csi.RegisterIdentityServer(s, d)
	csi.RegisterControllerServer(s, d)
	if d.config.NodeName != "" {
		csi.RegisterNodeServer(s, d)
	}
	stop := context.AfterFunc(ctx, func() {
		force := time.AfterFunc(stopTimeout, s.Stop)
		s.GracefulStop()
		force.Stop()
	})
	defer stop()
	err := s.Serve(l)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// edge is the one place where errors become gRPC statuses, panics become errors
// and calls are logged. Requests are never logged: they may carry secrets.
func (d *Driver) edge(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	start, rpc := time.Now(), path.Base(info.FullMethod)
	defer func() {
		if p := recover(); p != nil {
			d.log.Error("a CSI call panicked", "rpc", rpc, "panic", p, "stack", string(debug.Stack()))
			resp, err = nil, status.Errorf(codes.Internal, "%s panicked: %v", rpc, p)
		}
		switch code := status.Code(err); code {
		case codes.OK:
			d.log.Debug("CSI call", "rpc", rpc, "took", time.Since(start))
		case codes.NotFound, codes.Canceled:
		default:
			d.log.Warn("CSI call failed", "rpc", rpc, "took", time.Since(start), "code", code.String(), "err", err)
		}
	}()
	resp, err = handler(ctx, req)
	return resp, toGRPC(err)
}

// GetPluginInfo implements csi.IdentityServer.
func (d *Driver) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: Name, VendorVersion: d.config.Version}, nil
}

// GetPluginCapabilities implements csi.IdentityServer.
func (d *Driver) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	service := func(t csi.PluginCapability_Service_Type) *csi.PluginCapability {
		return &csi.PluginCapability{Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{Type: t}}}
	}
	return &csi.GetPluginCapabilitiesResponse{Capabilities: []*csi.PluginCapability{
		service(csi.PluginCapability_Service_CONTROLLER_SERVICE),
		service(csi.PluginCapability_Service_VOLUME_ACCESSIBILITY_CONSTRAINTS),
		{Type: &csi.PluginCapability_VolumeExpansion_{VolumeExpansion: &csi.PluginCapability_VolumeExpansion{Type: csi.PluginCapability_VolumeExpansion_ONLINE}}},
	}}, nil
}

// Probe says whether the policies can be read.
func (d *Driver) Probe(ctx context.Context, _ *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	if _, err := d.disks.Policies(ctx); err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}
