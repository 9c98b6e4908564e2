package image

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
)

// A classError has one class for code and one sentence for people. What caused
// it is in the sentence only: its own class would be a second one.
type classError struct {
	class error
	text  string
}

func (e *classError) Error() string { return e.text }
func (e *classError) Unwrap() error { return e.class }

func classed(class error, format string, args ...any) error {
	return &classError{class: class, text: fmt.Sprintf(format, args...)}
}

// explainPull says what went wrong with a pull of r, and what to do. Errors
// that have their sentence are left alone.
func (s *Store) explainPull(ctx context.Context, r ref, authenticated bool, err error) error {
	var done *classError
	var status remoteerrors.ErrUnexpectedStatus
	switch {
	case err == nil, errors.As(err, &done):
		return err
	case ctx.Err() != nil: // not by the error: net/http's timeouts pass for DeadlineExceeded
		return fmt.Errorf("pull image %s: %w", r, ctx.Err())
	case isDiskFull(err):
		return classed(errdefs.ErrResourceExhausted,
			"pull image %s: the disk under %s is full: remove images that are not needed or free space there: %v", r, s.root, err)
	case errors.As(err, &status):
		return explainStatus(r, authenticated, status)
	case errors.Is(err, docker.ErrInvalidAuthorization):
		return denied(r, authenticated, err)
	case errdefs.IsNotFound(err) && strings.Contains(err.Error(), "byte manifest for"): // containerd's resolver has no other sign
		return classed(errdefs.ErrFailedPrecondition,
			"image %s cannot be used: its manifest may have %d bytes, and has more: build it with fewer layers and annotations: %v", r, MaxManifest, err)
	case errdefs.IsNotFound(err):
		return classed(errdefs.ErrNotFound,
			"image %s does not exist at registry %s: check its name and tag (or its digest): %v", r, r.host(), err)
	case errdefs.IsDataLoss(err), errdefs.IsFailedPrecondition(err), errdefs.IsInvalidArgument(err), errors.Is(err, io.ErrUnexpectedEOF):
		return classed(errdefs.ErrDataLoss,
			"image %s: registry %s sent content that is not what its digest or size says: push the image again, or try another mirror: %v", r, r.host(), err)
	}
	if text := unreachable(err); text != "" {
		return classed(errdefs.ErrUnavailable, "pull image %s: registry %s %s: %v", r, r.host(), text, err)
	}
	return classed(errdefs.ErrUnavailable,
		"pull image %s: registry %s does not work as one: check that the name is a registry's, and its log: %v", r, r.host(), err)
}

func explainStatus(r ref, authenticated bool, status remoteerrors.ErrUnexpectedStatus) error {
	switch code := status.StatusCode; {
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		return denied(r, authenticated, status)
	case code == http.StatusNotFound:
		return classed(errdefs.ErrNotFound,
			"image %s does not exist at registry %s: check its name and tag (or its digest): %v", r, r.host(), status)
	case code == http.StatusTooManyRequests:
		return classed(errdefs.ErrUnavailable,
			"pull image %s: registry %s takes no more requests for now: wait, log in, or set up a mirror in hosts.toml: %v", r, r.host(), status)
	case code >= 500:
		return classed(errdefs.ErrUnavailable,
			"pull image %s: registry %s has an error of its own: try again later, or see its log: %v", r, r.host(), status)
	default:
		return classed(errdefs.ErrUnavailable,
			"pull image %s: registry %s answers as no registry would: check its name, and the server and path in hosts.toml: %v", r, r.host(), status)
	}
}

func denied(r ref, authenticated bool, err error) error {
	if authenticated {
		return classed(errdefs.ErrPermissionDenied,
			"image %s: registry %s refuses the credentials given, or they do not allow this image, or it does not exist: check the pull secret: %v", r, r.host(), err)
	}
	return classed(errdefs.ErrPermissionDenied,
		"image %s: registry %s wants credentials, or the image does not exist: check the name, or give the pod an imagePullSecret: %v", r, r.host(), err)
}

// unreachable says how a registry cannot be talked to, or "" if it is
// something else.
func unreachable(err error) string {
	var dns *net.DNSError
	var silent *silentError
	var authority x509.UnknownAuthorityError
	var hostname x509.HostnameError
	var cert *tls.CertificateVerificationError
	var op *net.OpError
	switch {
	case errors.As(err, &silent):
		return "does not answer: check the network, a proxy, and that the registry runs"
	case errors.As(err, &dns):
		return "has no address: check the name, the node's DNS, or name its server in hosts.toml"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refuses connections: check the port and that the registry runs"
	case errors.As(err, &authority), errors.As(err, &hostname), errors.As(err, &cert):
		return "has a certificate that this node does not trust: name its CA in hosts.toml (ca = …)"
	case strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return "speaks plain HTTP, which is refused unless hosts.toml says so (server = \"http://…\")"
	case errors.As(err, &op):
		return "cannot be reached: check the network, a proxy, and that the registry runs"
	}
	return ""
}

func isDiskFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errdefs.IsResourceExhausted(err)
}
