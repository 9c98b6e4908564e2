package csi

import (
	"errors"
	"syscall"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/openatoll/atoll/internal/grpcstatus"
)

// toGRPC gives an error its code: CSI's callers take one without for Internal.
func toGRPC(err error) error {
	out := grpcstatus.From(err)
	switch {
	case status.Code(out) != codes.Unknown:
		return out
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return status.Error(codes.ResourceExhausted, err.Error())
	}
	return status.Error(codes.Internal, err.Error())
}

func invalid(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format, args...)
}
