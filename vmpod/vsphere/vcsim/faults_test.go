package vcsim

import (
	"context"
	"testing"
	"time"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// TestFaults: each kind of failure, and that what was not to happen did not.
func TestFaults(t *testing.T) {
	now := func(ctx context.Context, c *govmomi.Client) error {
		_, err := methods.CurrentTime(ctx, c.Client, &types.CurrentTime{This: serviceInstance})
		return err
	}
	s := start(t, config(""))
	t.Run("a fault, after one call, twice", func(t *testing.T) {
		c := signIn(t, s, admin)
		defer s.Faults().Add(Fault{Method: "CurrentTime", Skip: 1, Times: 2, Fault: &types.HostCommunication{}})()
		for i, want := range []bool{true, false, false, true} {
			if err := now(t.Context(), c); (err == nil) != want || err != nil && !fault.Is(err, &types.HostCommunication{}) {
				t.Errorf("call %d: %v", i, err)
			}
		}
	})
	t.Run("an object's", func(t *testing.T) {
		c := signIn(t, s, admin)
		defer s.Faults().Add(Fault{Method: "*", Object: "Resources", Fault: &types.ResourceInUse{}})()
		if _, err := rootPool(t, c).Create(t.Context(), "x", spec()); !fault.Is(err, &types.ResourceInUse{}) {
			t.Error(err)
		}
		if err := now(t.Context(), c); err != nil {
			t.Error(err)
		}
	})
	t.Run("a session that is dropped", func(t *testing.T) {
		c := signIn(t, s, admin)
		defer s.Faults().Add(Fault{Method: "CurrentTime", Times: 1, Logout: true})()
		for range 2 {
			if err := now(t.Context(), c); !fault.Is(err, &types.NotAuthenticated{}) {
				t.Error(err)
			}
		}
	})
	t.Run("a connection that is cut, before and after", func(t *testing.T) {
		c := signIn(t, s, admin)
		for _, late := range []bool{false, true} {
			remove := s.Faults().Add(Fault{Method: "CreateResourcePool", Times: 1, Drop: true, Late: late})
			_, err := rootPool(t, c).Create(t.Context(), "cut", spec())
			if err == nil || soap.IsSoapFault(err) {
				t.Errorf("late %v: %v", late, err)
			}
			if made := poolNames(t, c)["cut"]; made != late {
				t.Errorf("late %v, made %v", late, made)
			}
			remove()
		}
	})
	t.Run("a task that fails, and one that never ends", func(t *testing.T) {
		c := signIn(t, s, admin)
		p := must[*object.ResourcePool](t)(rootPool(t, c).Create(t.Context(), "task", spec()))
		remove := s.Faults().Add(Fault{Method: "Destroy_Task", Task: true, Fault: &types.TaskInProgress{}})
		if err := finish(t.Context())(p.Destroy(t.Context())); !fault.Is(err, &types.TaskInProgress{}) {
			t.Error(err)
		}
		remove()
		remove = s.Faults().Add(Fault{Method: "Destroy_Task", Stuck: true})
		short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		if err := finish(short)(p.Destroy(short)); err == nil {
			t.Error("the task ended")
		}
		remove()
		if !poolNames(t, c)["task"] {
			t.Error("the pool is gone")
		}
		if err := finish(t.Context())(p.Destroy(t.Context())); err != nil {
			t.Error(err)
		}
	})
	t.Run("a delay ends with the caller", func(t *testing.T) {
		c := signIn(t, s, admin)
		defer s.Faults().Add(Fault{Method: "CurrentTime", Delay: time.Hour})()
		short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if err := now(short, c); err == nil {
			t.Error("answered")
		}
	})
}
