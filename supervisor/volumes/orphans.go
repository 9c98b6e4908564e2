package volumes

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/openatoll/atoll/storage"
)

// claimPrefix and a claim's UID are the name of its volume, snapshotPrefix and a
// VolumeSnapshot's that of its snapshot, which its content names by the handle once
// it is there.
const (
	claimPrefix    = "pvc-"
	snapshotPrefix = "snapshot-"
)

// lookForOrphans tells of what bears our mark in vCenter and nobody has. Of that,
// what is proven to be nobody's data goes once it has been so for the grace. It
// goes by lists from the API server and not by the cache.
func (c *connection) lookForOrphans(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, surveyTimeout)
	defer cancel()
	var asked error
	var claimed func(id, name string) bool
	found, err := c.store.Orphans(ctx, func(id, name string) bool {
		if claimed == nil && asked == nil { // after vCenter was asked
			claimed, asked = c.claimed(ctx)
		}
		return asked != nil || claimed(id, name)
	})
	if err = errors.Join(err, asked); err != nil {
		return err
	}
	seen := map[string]time.Time{}
	for _, o := range found {
		at, ok := c.orphans[o.ID]
		if !ok {
			at = time.Now()
		}
		seen[o.ID] = at
		c.report(o)
		if !o.Disposable || time.Since(at) < c.options.OrphanGrace {
			continue
		}
		if err := c.store.Discard(ctx, o); err != nil {
			c.log.Warn("an orphan could not be deleted", "vcenter", c.address, "id", o.ID, "volume", o.Name, "err", err)
			continue
		}
		delete(seen, o.ID)
		delete(c.reported, o.ID)
		c.log.Info("deleted what nobody has", "vcenter", c.address, "id", o.ID, "volume", o.Name, "why", o.Why)
		c.events.Eventf(c.supervisor, corev1.EventTypeNormal, "OrphanDeleted", "vCenter %s: %s (%s) is deleted: %s, and nobody has had it", c.address, o.Name, o.ID, o.Why)
	}
	c.orphans = seen
	orphansShown.Set(float64(len(seen)))
	return nil
}

// report tells once of what nobody has.
func (c *connection) report(o storage.Orphan) {
	if c.reported[o.ID] == o.Why {
		return
	}
	c.reported[o.ID] = o.Why
	c.log.Warn("vCenter has something of ours that nobody has", "vcenter", c.address, "id", o.ID, "volume", o.Name, "why", o.Why)
	c.events.Eventf(c.supervisor, corev1.EventTypeWarning, "OrphanedVolume", "vCenter %s: nobody has %s (%s): %s", c.address, o.Name, o.ID, o.Why)
}

// claimed tells whether a PersistentVolume or a VolumeSnapshotContent has a volume
// or snapshot, or a claim or VolumeSnapshot waits for it.
func (c *connection) claimed(ctx context.Context) (func(id, name string) bool, error) {
	// Claims first: one that is bound meanwhile has its PersistentVolume in the
	// second list.
	claims, err := c.client.CoreV1().PersistentVolumeClaims(metav1.NamespaceAll).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("claims: %w", err)
	}
	volumes, err := c.client.CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("volumes: %w", err)
	}
	contents, err := c.kinds.SnapshotV1().VolumeSnapshotContents().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("contents of snapshots: %w", err)
	}
	handles, names := map[string]bool{}, map[string]bool{}
	for i := range claims.Items {
		// One that was bound to another volume meanwhile waits for none.
		name, claim := claimPrefix+string(claims.Items[i].UID), &claims.Items[i]
		names[name] = claim.Spec.VolumeName == "" || claim.Spec.VolumeName == name
	}
	for i := range volumes.Items {
		if pv := &volumes.Items[i]; pv.Spec.CSI != nil {
			handles[pv.Spec.CSI.VolumeHandle], names[pv.Name] = true, true
		}
	}
	for i := range contents.Items {
		content := &contents.Items[i]
		handle := content.Spec.Source.SnapshotHandle
		if content.Status != nil && content.Status.SnapshotHandle != nil {
			handle = content.Status.SnapshotHandle
		}
		if handle != nil {
			handles[*handle] = true
		} else {
			names[snapshotPrefix+string(content.Spec.VolumeSnapshotRef.UID)] = true
		}
	}
	return func(id, name string) bool { return handles[id] || names[name] }, nil
}
