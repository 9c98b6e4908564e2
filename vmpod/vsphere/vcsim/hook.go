package vcsim

import (
	"context"
	"net/http"
	"reflect"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// How the simulator is hooked (TestHook guards what this relies on): before it
// looks for a method, Service.call asks Registry.Handler, which may change the
// call. A This that no registry knows makes it use the object that Handler
// returns; that one lives for one call and has one method.

// A call is one SOAP method that a client asks for.
type call struct {
	s       *Server
	ctx     *simulator.Context
	name    string
	this    types.ManagedObjectReference
	body    any
	who     Identity
	request *http.Request
}

// An invocation stands in for the object that a call is for.
type invocation struct {
	do func() soap.HasFault
}

func (*invocation) Reference() types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: "AtollInvocation", Value: "-"}
}

// Lock and Unlock keep the simulator from making a lock for it.
func (*invocation) Lock()   {}
func (*invocation) Unlock() {}

// Invoke is found by reflection.
func (i *invocation) Invoke(any) soap.HasFault { return i.do() }

// Login is, too: without a session, the simulator lets nothing of another name
// through.
func (i *invocation) Login(any) soap.HasFault { return i.do() }

// handle is Registry.Handler of all registries.
func (s *Server) handle(ctx *simulator.Context, m *simulator.Method) (mo.Reference, types.BaseMethodFault) {
	c := &call{s: s, ctx: ctx, name: m.Name, this: m.This, body: m.Body, request: requestOf(ctx)}
	rule, offered := s.methods[m.Name]
	if !offered {
		fault := &types.NotSupported{RuntimeFault: reason("the embedded vCenter does not offer " + m.Name)}
		if ctx.Session == nil {
			return nil, fault
		}
		return redirect(m, func() soap.HasFault { return refuse(fault) }), nil
	}
	s.faults.count(m.Name)
	if ctx.Session == nil {
		if !rule.anyone {
			return nil, &types.NotAuthenticated{NoPermission: types.NoPermission{Object: &c.this, PrivilegeId: privView}}
		}
	} else {
		who, err := s.users.Lookup(ctx.Session.UserName)
		if err != nil { // removed meanwhile
			s.endSession(ctx.Session.Key)
			return nil, &types.NotAuthenticated{NoPermission: types.NoPermission{Object: &c.this, PrivilegeId: privView}}
		}
		c.who = who
		s.sessions.touch(ctx.Session, time.Now())
	}
	if do, fault := c.injected(); fault != nil {
		return nil, fault
	} else if do != nil {
		return redirect(m, do), nil
	}
	if fault := c.allowed(rule); fault != nil {
		return redirect(m, func() soap.HasFault { return refuse(fault) }), nil
	}
	if rule.do == nil {
		return nil, nil
	}
	return redirect(m, func() soap.HasFault { return rule.do(c) }), nil
}

func redirect(m *simulator.Method, do func() soap.HasFault) mo.Reference {
	i := &invocation{do: do}
	m.This = i.Reference()
	if m.Name != "Login" {
		m.Name = "Invoke"
	}
	return i
}

// allowed checks that the object is there and that the caller has what the
// method needs.
func (c *call) allowed(rule method) types.BaseMethodFault {
	if c.ctx.Session == nil {
		return nil
	}
	if c.ctx.Map == c.s.vim && c.ctx.Session.Get(c.this) == nil {
		return &types.ManagedObjectNotFound{Obj: c.this}
	}
	if rule.needs == nil {
		return nil
	}
	if d, missing := c.s.missing(c.who, rule.needs(c)); missing {
		return noPermission(d)
	}
	return nil
}

// injected applies the fault rules.
func (c *call) injected() (do func() soap.HasFault, fault types.BaseMethodFault) {
	f, ok := c.s.faults.match(c.name, c.this.Value, c.s.nameOf(c.this), c.who.Name)
	if !ok {
		return nil, nil
	}
	c.s.delay(f.Delay, c.request)
	switch {
	case f.Logout && c.ctx.Session != nil:
		c.s.endSession(c.ctx.Session.Key)
		return nil, &types.NotAuthenticated{NoPermission: types.NoPermission{Object: &c.this, PrivilegeId: privView}}
	case f.Drop && f.Late:
		exchangeOf(c.request).drop = true
	case f.Drop:
		panic(http.ErrAbortHandler) // net/http cuts the connection
	case f.Hold != nil:
		exchangeOf(c.request).hold = f.Hold
	case f.Task && f.Late:
		exchangeOf(c.request).fail = f.Fault
	case f.Stuck, f.Task:
		return func() soap.HasFault { return c.task(nil, f.Fault, f.Stuck) }, nil
	case f.Fault != nil:
		return nil, f.Fault
	}
	return nil, nil
}

// reason puts a sentence for people into a fault.
func reason(sentence string) types.RuntimeFault {
	return types.RuntimeFault{MethodFault: cause(sentence)}
}

func vimReason(sentence string) types.VimFault {
	return types.VimFault{MethodFault: cause(sentence)}
}

func cause(sentence string) types.MethodFault {
	return types.MethodFault{
		FaultCause:   &types.LocalizedMethodFault{Fault: &types.SystemErrorFault{Reason: sentence}, LocalizedMessage: sentence},
		FaultMessage: []types.LocalizableMessage{{Key: "atoll.reason", Message: sentence}},
	}
}

// requestOf is the HTTP request of a call; the simulator keeps it to itself.
func requestOf(ctx *simulator.Context) *http.Request {
	v := reflect.ValueOf(ctx).Elem().FieldByName("req")
	if !v.IsValid() || v.IsNil() {
		return nil
	}
	return (*http.Request)(v.UnsafePointer())
}

// An exchange is what the layers that serve one request tell each other.
type exchange struct {
	drop bool // cut the connection instead of answering
	hold <-chan struct{}
	fail types.BaseMethodFault // of a task whose work was done
}

type exchangeKey struct{}

func exchangeOf(r *http.Request) *exchange {
	e, _ := r.Context().Value(exchangeKey{}).(*exchange)
	return e
}

func withExchange(r *http.Request) (*http.Request, *exchange) {
	e := &exchange{}
	return r.WithContext(context.WithValue(r.Context(), exchangeKey{}, e)), e
}

// locked runs f with an object's lock held.
func (s *Server) locked(obj mo.Reference, f func()) {
	s.vim.WithLock(&simulator.Context{Context: context.Background(), Map: s.vim}, obj, f)
}

// update changes an object and tells those who watch. The caller holds no lock
// of the object's.
func (s *Server) update(obj mo.Reference, changes ...types.PropertyChange) {
	ctx := &simulator.Context{Context: context.Background(), Map: s.vim}
	s.vim.WithLock(ctx, obj, func() { s.vim.Update(ctx, obj, changes) })
}

func set(name string, value types.AnyType) types.PropertyChange {
	return types.PropertyChange{Name: name, Op: types.PropertyChangeOpAssign, Val: value}
}

// nameOf an entity; empty for what is none.
func (s *Server) nameOf(ref types.ManagedObjectReference) (name string) {
	e, ok := s.vim.Get(ref).(mo.Entity)
	if ok {
		s.locked(e, func() { name = e.Entity().Name })
	}
	return name
}
