package vsphere

import (
	"context"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

func contains(err error, text string) bool { return err != nil && strings.Contains(err.Error(), text) }

type tlsServer struct {
	addr string
	ca   []byte
}

func newTLSServer(t *testing.T, h http.HandlerFunc) tlsServer {
	t.Helper()
	s := httptest.NewTLSServer(h)
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return tlsServer{s.Listener.Addr().String(), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})}
}

func TestErrorClasses(t *testing.T) {
	pool := types.ManagedObjectReference{Type: "ResourcePool", Value: "resgroup-7"}
	for _, c := range []struct {
		fault types.BaseMethodFault
		class error
		text  string
	}{
		{&types.NotAuthenticated{}, errdefs.ErrUnavailable, "dropped the session"},
		{&types.InvalidLogin{}, errdefs.ErrUnavailable, "refuses the login"},
		{&types.PasswordExpired{}, errdefs.ErrUnavailable, "refuses the login"},
		{&types.NoPermission{Object: &pool, PrivilegeId: "Resource.EditPool"}, errdefs.ErrPermissionDenied, "lacks the privilege Resource.EditPool on ResourcePool resgroup-7"},
		{&types.DuplicateName{Name: "team-a", Object: pool}, errdefs.ErrAlreadyExists, "team-a is taken by resgroup-7"},
		{&types.ManagedObjectNotFound{Obj: pool}, errdefs.ErrAborted, "resgroup-7 was deleted meanwhile"},
		{&types.ConcurrentAccess{}, errdefs.ErrAborted, "meanwhile"},
		{&types.UserNotFound{Principal: "x"}, errdefs.ErrInvalidArgument, `no user or group "x"`},
		{&types.InvalidArgument{InvalidProperty: "spec.cpuAllocation"}, errdefs.ErrInvalidArgument, "spec.cpuAllocation"},
		{&types.InvalidName{Name: "a/b"}, errdefs.ErrInvalidArgument, "a/b"},
		{&types.InsufficientCpuResourcesFault{}, errdefs.ErrFailedPrecondition, "lower the reservation"},
		{&types.InsufficientMemoryResourcesFault{}, errdefs.ErrFailedPrecondition, "lower the reservation"},
		{&types.Timedout{}, errdefs.ErrUnavailable, "busy or gave up"},
		{&types.InvalidPowerState{}, errdefs.ErrFailedPrecondition, "InvalidPowerState"},
		{&types.SystemError{Reason: "x"}, errdefs.ErrUnknown, "SystemError"},
	} {
		for kind, err := range map[string]error{
			"task": &FaultError{Method: c.fault},
			"call": soap.WrapVimFault(c.fault),
		} {
			t.Run(faultName(c.fault)+"/"+kind, func(t *testing.T) {
				got := Error("change team-a", err)
				mustBe(t, got, c.class, c.text)
				mustBe(t, got, c.class, "change team-a: ")
				mustBe(t, Error("again", got), c.class, "again: change team-a: ")
			})
		}
	}
	if Error("x", nil) != nil {
		t.Error("no error has become one")
	}
	if err := Error("x", context.Canceled); !errors.Is(err, context.Canceled) {
		t.Errorf("given up is %v", err)
	}
}
