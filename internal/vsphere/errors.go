package vsphere

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"reflect"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// What ErrUnavailable can mean beside "no answer", for errors.Is: the cure is
// another.
var (
	ErrLogin     error = &kind{errdefs.ErrUnavailable} // vCenter refuses the credentials
	ErrUntrusted error = &kind{errdefs.ErrUnavailable} // its certificate is not trusted
)

// A kind is a class that is told from others of the same class.
type kind struct{ class error }

func (k *kind) Error() string { return k.class.Error() }
func (k *kind) Unwrap() error { return k.class }

// Error gives an error of govmomi's a class and a sentence: what was attempted
// ("create resource pool team-a"), why it failed, and the cure where there is
// one. An error that has a class already only gets what. It is nil for nil.
//
// ErrUnavailable means that nothing is known; ErrAborted that the object went
// or changed meanwhile; ErrUnknown that vCenter's reason has no class.
func Error(what string, err error) error {
	if err == nil {
		return nil
	}
	if classed(err) {
		return fmt.Errorf("%s: %w", what, err)
	}
	reason, class := classify(err)
	return fmt.Errorf("%s: %s: %w", what, reason, class)
}

// classed tells whether an error of this package's is in err already.
func classed(err error) bool {
	return errdefs.IsUnavailable(err) || errdefs.IsPermissionDenied(err) ||
		errdefs.IsInvalidArgument(err) || errdefs.IsFailedPrecondition(err) || errdefs.IsAborted(err) ||
		errdefs.IsAlreadyExists(err) || errors.Is(err, errdefs.ErrUnknown)
}

// A FaultError is a fault of vCenter's that came with a task.
type FaultError struct {
	Reason string // localized; may be empty
	Method types.BaseMethodFault
}

func (e *FaultError) Error() string {
	if e.Reason != "" {
		return e.Reason
	}
	return faultName(e.Method)
}

// Fault is as govmomi's errors have it.
func (e *FaultError) Fault() types.BaseMethodFault { return e.Method }

// Fault is the fault in err, nil if there is none.
func Fault(err error) types.BaseMethodFault {
	var task *FaultError
	if errors.As(err, &task) {
		return task.Method
	}
	for ; err != nil; err = errors.Unwrap(err) {
		if soap.IsSoapFault(err) {
			return asFault(soap.ToSoapFault(err).VimFault())
		}
		if soap.IsVimFault(err) {
			return soap.ToVimFault(err)
		}
	}
	return nil
}

// asFault gives a fault that was decoded as a value its method set.
func asFault(v any) types.BaseMethodFault {
	if f, ok := v.(types.BaseMethodFault); ok {
		return f
	}
	r := reflect.ValueOf(v)
	if !r.IsValid() || r.Kind() == reflect.Pointer {
		return nil
	}
	p := reflect.New(r.Type())
	p.Elem().Set(r)
	f, _ := p.Interface().(types.BaseMethodFault)
	return f
}

func faultName(f types.BaseMethodFault) string {
	t := reflect.TypeOf(f)
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t == nil {
		return "unknown fault"
	}
	return t.Name()
}

// NotAuthenticated tells whether the session is gone: the call was not made.
func NotAuthenticated(err error) bool {
	_, ok := Fault(err).(*types.NotAuthenticated)
	return ok
}

// IsNotFound tells whether vCenter says that an object is not there. Whoever
// deletes may take that for done; whoever does not must not conclude more than
// that the object it knew is gone.
func IsNotFound(err error) bool {
	_, ok := Fault(err).(*types.ManagedObjectNotFound)
	return ok
}

// Duplicate is the object whose name is in the way, if err says so.
func Duplicate(err error) (types.ManagedObjectReference, bool) {
	f, ok := Fault(err).(*types.DuplicateName)
	if !ok {
		return types.ManagedObjectReference{}, false
	}
	return f.Object, true
}

func classify(err error) (reason string, class error) {
	fault := Fault(err)
	if fault == nil {
		return classifyTransport(err)
	}
	switch f := fault.(type) {
	case *types.NotAuthenticated:
		return "vCenter dropped the session", errdefs.ErrUnavailable
	case *types.NoPermission:
		return noPermission(f), errdefs.ErrPermissionDenied
	case types.BaseNoPermission:
		return noPermission(f.GetNoPermission()), errdefs.ErrPermissionDenied
	case types.BaseInvalidLogin:
		return "vCenter refuses the login", ErrLogin
	case *types.DuplicateName:
		return fmt.Sprintf("the name %s is taken by %s", f.Name, f.Object.Value), errdefs.ErrAlreadyExists
	case *types.AlreadyExists:
		return "it exists already", errdefs.ErrAlreadyExists
	case *types.ManagedObjectNotFound:
		return fmt.Sprintf("%s was deleted meanwhile", f.Obj.Value), errdefs.ErrAborted
	case *types.ConcurrentAccess:
		return "somebody else changed it meanwhile", errdefs.ErrAborted
	case *types.UserNotFound:
		return fmt.Sprintf("vCenter knows no user or group %q: check the access list and the identity source", f.Principal), errdefs.ErrInvalidArgument
	case types.BaseInvalidArgument:
		return "vCenter refuses the value of " + f.GetInvalidArgument().InvalidProperty + detail(err), errdefs.ErrInvalidArgument
	case *types.InvalidName:
		return fmt.Sprintf("%q is no name for vSphere", f.Name), errdefs.ErrInvalidArgument
	case types.BaseInsufficientResourcesFault:
		return "the parent pool has not that much left (" + faultName(fault) + "): lower the reservation or give the parent more", errdefs.ErrFailedPrecondition
	case *types.RequestCanceled, *types.Timedout, *types.TaskInProgress:
		return "vCenter is busy or gave up (" + faultName(fault) + ")", errdefs.ErrUnavailable
	case types.BaseHostCommunication:
		return "vCenter cannot reach the host", errdefs.ErrUnavailable
	case types.BaseInvalidState, *types.ResourceInUse:
		return "its state does not allow it (" + faultName(fault) + ")", errdefs.ErrFailedPrecondition
	case *types.NotSupported:
		return "this vCenter does not support it" + detail(err), errdefs.ErrFailedPrecondition
	}
	return "vCenter says " + faultName(fault) + detail(err), errdefs.ErrUnknown
}

func noPermission(f *types.NoPermission) string {
	object := "an object"
	if f.Object != nil {
		object = f.Object.Type + " " + f.Object.Value
	}
	privilege := f.PrivilegeId
	if privilege == "" {
		privilege = "(vCenter does not say which)"
	}
	return fmt.Sprintf("the vCenter user lacks the privilege %s on %s: give it a role that has it", privilege, object)
}

// detail is vCenter's own text, where it says more than the name of the fault.
func detail(err error) string {
	text := err.Error()
	var l *FaultError
	if !errors.As(err, &l) {
		_, text, _ = strings.Cut(text, ": ")
	}
	if f := Fault(err); text == "" || strings.HasSuffix(text, faultName(f)) {
		return ""
	}
	return ": " + text
}

func classifyTransport(err error) (reason string, class error) {
	if msg, ok := untrusted(err); ok {
		return msg, ErrUntrusted
	}
	var host *net.DNSError
	var u *url.Error
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return "no answer in time: what was asked may have happened or not", errdefs.ErrUnavailable
	case errors.Is(err, context.Canceled):
		return "given up", context.Canceled
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "vCenter closed the connection without an answer: what was asked may have happened or not", errdefs.ErrUnavailable
	case errors.As(err, &host):
		return host.Error() + ": check the address", errdefs.ErrUnavailable
	case errors.As(err, &u):
		// Its text names method and address; userinfo is never in it, since the
		// Session's address has none.
		return u.Err.Error(), errdefs.ErrUnavailable
	case errors.As(err, new(net.Error)):
		return err.Error(), errdefs.ErrUnavailable
	case soap.IsSoapFault(err):
		return soap.ToSoapFault(err).String, errdefs.ErrUnknown
	}
	return err.Error(), errdefs.ErrUnavailable
}

// untrusted says what is wrong with the server's certificate.
func untrusted(err error) (string, bool) {
	var unknown x509.UnknownAuthorityError
	var name x509.HostnameError
	var invalid x509.CertificateInvalidError
	var tlsErr *tls.CertificateVerificationError
	var pin *thumbprintError
	switch {
	case errors.As(err, &pin):
		return pin.Error(), true
	case errors.As(err, &unknown):
		return "its certificate is of an unknown authority: give vCenter's CA or the certificate's thumbprint", true
	case errors.As(err, &name):
		return name.Error() + ": use the name in the certificate, or give its thumbprint", true
	case errors.As(err, &invalid):
		return invalid.Error() + ": renew vCenter's certificate", true
	case errors.As(err, &tlsErr):
		return tlsErr.Error(), true
	}
	return "", false
}
