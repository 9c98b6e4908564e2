package csi

import (
	"errors"
	"syscall"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/openatoll/atoll/internal/grpcstatus"
	"github.com/openatoll/atoll/storage"
)

// The detail of a status by which a caller learns which host could do what this
// one cannot: an ErrorInfo of the domain Name.
const (
	reasonHeldElsewhere = "VOLUME_HELD_ELSEWHERE"
	metadataHost        = "host"
)

// toGRPC gives an error its code: CSI's callers take one without for Internal.
func toGRPC(err error) error {
	if held := new(storage.HeldElsewhereError); errors.As(err, &held) {
		return heldElsewhere(err, held.Holder.Host)
	}
	out := grpcstatus.From(err)
	switch {
	case status.Code(out) != codes.Unknown:
		return out
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return status.Error(codes.ResourceExhausted, err.Error())
	}
	return status.Error(codes.Internal, err.Error())
}

func heldElsewhere(err error, host string) error {
	s := status.New(codes.FailedPrecondition, err.Error())
	with, detailErr := s.WithDetails(&errdetails.ErrorInfo{Reason: reasonHeldElsewhere, Domain: Name, Metadata: map[string]string{metadataHost: host}})
	if detailErr != nil { // a host's name that is no UTF-8
		return s.Err()
	}
	return with.Err()
}

// HeldBy is the node that alone can make the copy for which the driver was asked,
// since its pod's VM writes to the volume; empty if a call failed for another reason.
func HeldBy(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == Name && info.GetReason() == reasonHeldElsewhere {
			return info.GetMetadata()[metadataHost]
		}
	}
	return ""
}

func invalid(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format, args...)
}
