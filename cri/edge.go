package cri

import (
	"context"
	"errors"
	"path"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/openatoll/atoll/internal/grpcstatus"
)

// unaryEdge is the one place where errors become gRPC statuses, panics become
// errors and RPCs are logged. Requests are never logged: they carry
// credentials and environments.
func (s *Server) unaryEdge(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	start := time.Now()
	ctx, guest := withGuestTime(ctx)
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("a CRI call panicked", "rpc", path.Base(info.FullMethod), "panic", p, "stack", string(debug.Stack()))
			resp, err = nil, status.Errorf(codes.Internal, "%s panicked: %v", path.Base(info.FullMethod), p)
		}
		s.logRPC(info.FullMethod, start, guest, err)
	}()
	resp, err = handler(ctx, req)
	return resp, toGRPC(err)
}

func (s *Server) streamEdge(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	start := time.Now()
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("a CRI call panicked", "rpc", path.Base(info.FullMethod), "panic", p, "stack", string(debug.Stack()))
			err = status.Errorf(codes.Internal, "%s panicked: %v", path.Base(info.FullMethod), p)
		}
		s.logRPC(info.FullMethod, start, nil, err)
	}()
	return toGRPC(handler(srv, ss))
}

// toGRPC gives an error its code, by its class or by what a file system said.
func toGRPC(err error) error {
	out := grpcstatus.From(err)
	if status.Code(out) == codes.Unknown {
		if code := codeOfErrno(err); code != codes.Unknown {
			return status.Error(code, err.Error())
		}
	}
	return out
}

// codeOfErrno gives a file system's refusal a code. What is missing on this
// host is never NotFound: clients take that for a container that is gone.
func codeOfErrno(err error) codes.Code {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return codes.Unknown
	}
	switch errno {
	case syscall.EISDIR, syscall.ENOTDIR, syscall.ENAMETOOLONG, syscall.ELOOP, syscall.EINVAL:
		return codes.InvalidArgument
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM:
		return codes.ResourceExhausted
	case syscall.ENOENT, syscall.EEXIST, syscall.EACCES, syscall.EPERM, syscall.EROFS, syscall.EBUSY, syscall.EIO:
		return codes.FailedPrecondition
	}
	return codes.Unknown
}

func (s *Server) logRPC(method string, start time.Time, guest *guestTime, err error) {
	name := path.Base(method)
	took := time.Since(start)
	switch {
	case err != nil && status.Code(err) != codes.NotFound && status.Code(err) != codes.Canceled:
		s.log.Warn("CRI call failed", "rpc", name, "took", took, "code", status.Code(err).String(), "err", err)
	case changes(name):
		s.log.Debug("CRI call", "rpc", name, "took", took, "guest", guest.total())
	}
}

// changes tells the calls that change something from those that are polled.
func changes(rpc string) bool {
	for _, p := range []string{"Run", "Stop", "Remove", "Create", "Start", "Update", "Pull", "Reopen", "Exec"} {
		if strings.HasPrefix(rpc, p) {
			return true
		}
	}
	return false
}
