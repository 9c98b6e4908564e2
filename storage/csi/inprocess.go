package csi

import (
	"context"
	"path"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// Controller calls the driver's controller service in this process, with the
// statuses that a socket would carry.
func (d *Driver) Controller() csi.ControllerClient { return csi.NewControllerClient(inProcess{d}) }

// inProcess is a connection without a socket.
type inProcess struct{ driver *Driver }

// Invoke implements grpc.ClientConnInterface.
func (c inProcess) Invoke(ctx context.Context, method string, args, reply any, _ ...grpc.CallOption) error {
	for _, m := range csi.Controller_ServiceDesc.Methods {
		if m.MethodName != path.Base(method) {
			continue
		}
		decode := func(into any) error { return copyMessage(into, args) }
		out, err := m.Handler(c.driver, ctx, decode, c.driver.edge)
		if err != nil {
			return err
		}
		return copyMessage(reply, out)
	}
	return status.Errorf(codes.Unimplemented, "%s is no method of the controller service", method)
}

// copyMessage: neither side sees what the other does to its message later.
func copyMessage(into, from any) error {
	to, ok := into.(proto.Message)
	message, ok2 := from.(proto.Message)
	if !ok || !ok2 {
		return status.Errorf(codes.Internal, "%T and %T are no messages", into, from)
	}
	proto.Merge(to, message)
	return nil
}

// NewStream implements grpc.ClientConnInterface; CSI has no streams.
func (inProcess) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, status.Error(codes.Unimplemented, "the controller service has no streams")
}
