package vc

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/internal/vsphere"
)

// EventType is the type id of Atoll's events in vCenter.
const EventType = "dev.atoll.namespace"

// Post writes an event on the pools of a namespace; none is no error.
func (c *Client) Post(ctx context.Context, r Ref, e Event) error {
	s, err := c.State(r)
	if err != nil {
		return fmt.Errorf("event on namespace %s: %w", r.Name, err)
	}
	var errs []error
	for _, p := range s.Pools {
		event := &types.EventEx{
			EventTypeId: EventType, Severity: string(e.Severity), Message: e.Message,
			ObjectType: "ResourcePool", ObjectId: p.ID, ObjectName: p.Name,
		}
		// vCenter sets key, time and user itself.
		event.CreatedTime, event.FullFormattedMessage = time.Now(), e.Message
		manager := *c.session.Client().ServiceContent.EventManager
		_, err := methods.PostEvent(ctx, c.session, &types.PostEvent{This: manager, EventToPost: event})
		if err != nil {
			errs = append(errs, vsphere.Error("write an event on "+poolObject(p.Path), err))
		}
	}
	return errors.Join(errs...)
}
