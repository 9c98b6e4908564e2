package agentapi

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// classes pairs each errdefs class with the gRPC code that carries it.
var classes = []struct {
	class error
	code  codes.Code
}{
	{errdefs.ErrNotFound, codes.NotFound},
	{errdefs.ErrAlreadyExists, codes.AlreadyExists},
	{errdefs.ErrInvalidArgument, codes.InvalidArgument},
	{errdefs.ErrFailedPrecondition, codes.FailedPrecondition},
	{errdefs.ErrPermissionDenied, codes.PermissionDenied},
	{errdefs.ErrUnavailable, codes.Unavailable},
	{errdefs.ErrResourceExhausted, codes.ResourceExhausted},
	{errdefs.ErrNotImplemented, codes.Unimplemented},
	{errdefs.ErrOutOfRange, codes.OutOfRange},
	{errdefs.ErrAborted, codes.Aborted},
	{errdefs.ErrDataLoss, codes.DataLoss},
	{errdefs.ErrInternal, codes.Internal},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{context.Canceled, codes.Canceled},
}

// codeOf is the gRPC code for an error of the guest.
func codeOf(err error) codes.Code {
	for _, c := range classes {
		if errors.Is(err, c.class) {
			return c.code
		}
	}
	if s, ok := status.FromError(err); ok {
		return s.Code()
	}
	return codes.Unknown
}

// toStatus makes what ttrpc sends of an error of the guest.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codeOf(err), clip(err.Error(), maxErrorText))
}

// fromCode makes the host's error of what the guest sent: it wraps an errdefs
// class (ErrUnknown where the code has none) and keeps the guest's text.
func fromCode(code codes.Code, message string) error {
	message = clip(message, maxErrorText)
	for _, c := range classes {
		if c.code == code {
			return &guestError{class: c.class, text: message}
		}
	}
	return &guestError{class: errdefs.ErrUnknown, text: message}
}

// guestError carries a class without repeating its name in the text.
type guestError struct {
	class error
	text  string
}

func (e *guestError) Error() string { return e.text }
func (e *guestError) Unwrap() error { return e.class }

// maxErrorText is how much of an error's text crosses the channel.
const maxErrorText = 4096

// clip bounds a text, in bytes. The result is UTF-8, or protobuf would refuse
// the whole message.
func clip(s string, n int) string {
	if len(s) > n {
		s = strings.ToValidUTF8(s[:n], "") + "…"
	}
	return strings.ToValidUTF8(s, "\ufffd")
}

// errBroken says that the session ended under a caller.
func errBroken(cause error) error {
	if cause == nil {
		return fmt.Errorf("agent session ended; attach again: %w", errdefs.ErrUnavailable)
	}
	if errors.Is(cause, ErrMisbehaved) {
		return fmt.Errorf("agent session ended: %w: %w", cause, errdefs.ErrUnavailable)
	}
	return fmt.Errorf("agent session ended (%v); attach again: %w", cause, errdefs.ErrUnavailable)
}
