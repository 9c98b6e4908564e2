package vcsim

import (
	"context"
	"net/http"
	"reflect"
	"testing"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// TestHook guards what this package relies on in the simulator's inside: read
// its failures before raising govmomi's version.
func TestHook(t *testing.T) {
	t.Run("the request of a call", func(t *testing.T) {
		f, ok := reflect.TypeFor[simulator.Context]().FieldByName("req")
		if !ok || f.Type != reflect.TypeFor[*http.Request]() {
			t.Fatalf("simulator.Context.req is %v: requestOf finds no request", f.Type)
		}
	})
	t.Run("the counter of ids", func(t *testing.T) {
		f, ok := reflect.TypeFor[simulator.Registry]().FieldByName("counter")
		if !ok || f.Type != reflect.TypeFor[int64]() {
			t.Fatalf("simulator.Registry.counter is %v: startIDs cannot set it", f.Type)
		}
	})
	t.Run("a handler replaces the call", func(t *testing.T) {
		s := start(t, Config{AdminPassword: testPassword})
		c := signIn(t, s, admin)
		called := false
		s.vim.Handler = func(ctx *simulator.Context, m *simulator.Method) (mo.Reference, types.BaseMethodFault) {
			if m.Name != "CurrentTime" {
				return s.handle(ctx, m)
			}
			if requestOf(ctx) == nil || exchangeOf(requestOf(ctx)) == nil {
				t.Error("no request in the call's context")
			}
			return redirect(m, func() soap.HasFault {
				called = true
				return refuse(&types.NotSupported{RuntimeFault: reason("because")})
			}), nil
		}
		_, err := methods.CurrentTime(t.Context(), c.Client, &types.CurrentTime{This: serviceInstance})
		if !called || !soap.IsSoapFault(err) {
			t.Errorf("called %v, answered %v", called, err)
		}
	})
	t.Run("a collector is made for each session by reflection", func(t *testing.T) {
		s := start(t, Config{AdminPassword: testPassword})
		session := &simulator.Session{Registry: simulator.NewRegistry(), Map: s.vim}
		ref := s.svc.Context.Map.Get(serviceInstance).(*simulator.ServiceInstance).Content.PropertyCollector
		mine, ok := session.Get(ref).(*collector)
		if !ok || mine == s.vim.Get(ref) || mine.server != nil {
			t.Errorf("a session's collector is %T, shared or not empty", session.Get(ref))
		}
	})
	t.Run("every method offered is one of the simulator's or ours", func(t *testing.T) {
		for name, m := range soapMethods() {
			known := func(prefix string) bool { _, ok := types.TypeFunc()(prefix + name); return ok }
			if !known("") && !known("pbm:") && !known("vslm:") {
				t.Errorf("%s is no method of vSphere", name)
			}
			if m.anyone && m.needs != nil {
				t.Errorf("%s is for anyone and needs a privilege", name)
			}
		}
	})
	t.Run("every privilege asked for is one", func(t *testing.T) {
		s := start(t, Config{AdminPassword: testPassword})
		c := &call{s: s, ctx: &simulator.Context{Context: context.Background(), Map: s.vim}, this: s.root}
		bodies := map[string]any{
			"UpdateConfig": &types.UpdateConfig{}, "MoveIntoResourcePool": &types.MoveIntoResourcePool{},
			"MoveIntoFolder_Task": &types.MoveIntoFolder_Task{}, "PostEvent": &types.PostEvent{},
			"ReconfigVM_Task": &types.ReconfigVM_Task{},
		}
		for name, m := range soapMethods() {
			if m.needs == nil {
				continue
			}
			c.body = bodies[name]
			for _, d := range m.needs(c) {
				if !s.access.privileges[d.privilege] {
					t.Errorf("%s needs %s, which is no privilege", name, d.privilege)
				}
			}
		}
	})
}
