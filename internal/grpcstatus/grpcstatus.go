// Package grpcstatus gives errors the codes of gRPC.
package grpcstatus

import (
	"context"
	"errors"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// From keeps a status that is one already, and gives every other error the code
// of its errdefs class, or of the context that ended. An error without any is
// codes.Unknown; nil is nil.
func From(err error) error {
	if err == nil {
		return nil
	}
	if st, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return st.GRPCStatus().Err()
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, err.Error())
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	}
	return errgrpc.ToGRPC(err)
}
