package vcsim

import (
	"strings"
	"testing"

	"github.com/vmware/govmomi/event"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"
)

// TestEvents: what was done to a pool, and what was posted about it, is among
// its cluster's events, in the name of who did it; what was posted is among the
// pool's own, too.
func TestEvents(t *testing.T) {
	s := start(t, config(""))
	c := signIn(t, s, admin)
	p := must[*object.ResourcePool](t)(rootPool(t, c).Create(t.Context(), "team", spec()))
	ref := p.Reference()
	if _, err := methods.PostEvent(t.Context(), c.Client, &types.PostEvent{This: *c.ServiceContent.EventManager, EventToPost: &types.EventEx{
		EventTypeId: "dev.atoll.test", Severity: "warning", Message: "the limit was changed", ObjectType: ref.Type, ObjectId: ref.Value,
	}}); err != nil {
		t.Fatal(err)
	}
	posted := `VSPHERE.LOCAL\Administrator: the limit was changed`
	for at, want := range map[types.ManagedObjectReference][]string{
		s.parent(rootPool(t, c).Reference()): {`VSPHERE.LOCAL\Administrator: Created resource pool team in Resources`, posted},
		ref:                                  {posted},
	} {
		events := must[[]types.BaseEvent](t)(event.NewManager(c.Client).QueryEvents(t.Context(), types.EventFilterSpec{
			Entity: &types.EventFilterSpecByEntity{Entity: at, Recursion: types.EventFilterSpecRecursionOptionSelf},
		}))
		var told []string
		for _, e := range events {
			told = append(told, e.GetEvent().UserName+": "+e.GetEvent().FullFormattedMessage)
		}
		for _, want := range want {
			if !strings.Contains(strings.Join(told, "\n"), want) {
				t.Errorf("no %q among %q of %s", want, told, at.Type)
			}
		}
	}
}
