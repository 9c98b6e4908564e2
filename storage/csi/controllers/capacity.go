package controllers

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"reflect"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/tools/cache"

	atollcsi "github.com/openatoll/atoll/storage/csi"
)

const (
	// capacityPeriod is how often the driver is asked without a cause: others
	// write to the file systems of its datastores, too.
	capacityPeriod = time.Minute
	// capacityAfter is how long after a change it is asked, so that many changes
	// cost one question.
	capacityAfter = 200 * time.Millisecond
	// capacityTimeout bounds one question.
	capacityTimeout = 10 * time.Second

	// Labels of CSIStorageCapacity objects, as external-provisioner has them.
	driverLabel    = "csi.storage.k8s.io/drivername"
	managedByLabel = "csi.storage.k8s.io/managed-by"
	managedBy      = "atoll-node"
)

// capacityController keeps one CSIStorageCapacity object for each class of the
// driver: what is left on the node.
type capacityController struct {
	*group
	wake chan struct{}
	// owner is the Node, with which the objects go; nil until it is there.
	owner *metav1.OwnerReference
	// one publishes at a time.
	one sync.Mutex
}

func newCapacityController(g *group) *capacityController {
	c := &capacityController{group: g, wake: make(chan struct{}, 1)}
	classes := g.factory.Storage().V1().StorageClasses().Informer()
	_, _ = classes.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { c.changed() }, UpdateFunc: func(any, any) { c.changed() }, DeleteFunc: func(any) { c.changed() },
	})
	return c
}

// changed has the driver asked soon.
func (c *capacityController) changed() {
	if c == nil {
		return
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *capacityController) run(ctx context.Context) {
	for {
		if err := c.publish(ctx); err != nil && ctx.Err() == nil {
			c.Logger.Warn("room for volumes could not be published; trying again", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(capacityPeriod):
		case <-c.wake:
			select {
			case <-ctx.Done():
				return
			case <-time.After(capacityAfter):
			}
		}
	}
}

func (c *capacityController) publish(ctx context.Context) error {
	c.one.Lock()
	defer c.one.Unlock()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := c.findOwner(ctx); err != nil {
		return err
	}
	classes, err := c.factory.Storage().V1().StorageClasses().Lister().List(labels.Everything())
	if err != nil {
		return err
	}
	objects := c.client.StorageV1().CSIStorageCapacities(c.Namespace)
	have, err := objects.List(ctx, metav1.ListOptions{LabelSelector: labels.Set{driverLabel: c.Driver, managedByLabel: managedBy}.String()})
	if err != nil {
		return err
	}
	old := map[string]*storagev1.CSIStorageCapacity{}
	for i := range have.Items {
		if t := have.Items[i].NodeTopology; t != nil && reflect.DeepEqual(t.MatchLabels, c.nodeLabels()) {
			old[have.Items[i].Name] = &have.Items[i]
		}
	}
	var failed error
	for _, class := range classes {
		if class.Provisioner != c.Driver {
			continue
		}
		want, err := c.object(ctx, class)
		if err == nil {
			err = c.put(ctx, old[want.Name], want)
			delete(old, want.Name)
		}
		if err != nil {
			failed = err
		}
	}
	if failed != nil {
		return failed
	}
	for name := range old {
		if err := objects.Delete(ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return err
		}
	}
	return nil
}

func (c *capacityController) findOwner(ctx context.Context) error {
	if c.owner != nil {
		return nil
	}
	node, err := c.client.CoreV1().Nodes().Get(ctx, c.NodeName, metav1.GetOptions{})
	if err != nil {
		return err
	}
	c.owner = &metav1.OwnerReference{APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID}
	return nil
}

// nodeLabels select this node alone.
func (c *capacityController) nodeLabels() map[string]string {
	return map[string]string{atollcsi.TopologyHost: c.segments[atollcsi.TopologyHost]}
}

// room asks the driver about one class. Where a datastore does not answer there
// is no room now, however much there was.
func (c *capacityController) room(ctx context.Context, parameters map[string]string) (*csi.GetCapacityResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, capacityTimeout)
	defer cancel()
	resp, err := c.controller.GetCapacity(ctx, &csi.GetCapacityRequest{Parameters: parameters, AccessibleTopology: &csi.Topology{Segments: c.segments}})
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded:
		c.Logger.Warn("a datastore does not answer: it counts as full until it does", "policy", parameters[atollcsi.ParameterPolicy], "err", err)
		return &csi.GetCapacityResponse{MaximumVolumeSize: wrapperspb.Int64(0)}, nil
	}
	return resp, err
}

// object says what room there is for one class.
func (c *capacityController) object(ctx context.Context, class *storagev1.StorageClass) (*storagev1.CSIStorageCapacity, error) {
	parameters := map[string]string{}
	for k, v := range class.Parameters {
		if k != parameterFSType {
			parameters[k] = v
		}
	}
	resp, err := c.room(ctx, parameters)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256([]byte(c.NodeName + "/" + class.Name))
	o := &storagev1.CSIStorageCapacity{
		ObjectMeta: metav1.ObjectMeta{
			Name: "atoll-" + hex.EncodeToString(sum[:10]), Namespace: c.Namespace,
			Labels:          map[string]string{driverLabel: c.Driver, managedByLabel: managedBy},
			OwnerReferences: []metav1.OwnerReference{*c.owner},
		},
		NodeTopology:     &metav1.LabelSelector{MatchLabels: c.nodeLabels()},
		StorageClassName: class.Name,
		Capacity:         resource.NewQuantity(resp.GetAvailableCapacity(), resource.BinarySI),
	}
	if m := resp.GetMaximumVolumeSize(); m != nil {
		o.MaximumVolumeSize = resource.NewQuantity(m.Value, resource.BinarySI)
	}
	return o, nil
}

func (c *capacityController) put(ctx context.Context, old, want *storagev1.CSIStorageCapacity) error {
	objects := c.client.StorageV1().CSIStorageCapacities(c.Namespace)
	if old == nil {
		_, err := objects.Create(ctx, want, metav1.CreateOptions{})
		return err
	}
	if equal(old.Capacity, want.Capacity) && equal(old.MaximumVolumeSize, want.MaximumVolumeSize) && reflect.DeepEqual(old.OwnerReferences, want.OwnerReferences) {
		return nil
	}
	next := old.DeepCopy()
	next.Capacity, next.MaximumVolumeSize, next.OwnerReferences = want.Capacity, want.MaximumVolumeSize, want.OwnerReferences
	_, err := objects.Update(ctx, next, metav1.UpdateOptions{})
	return err
}

func equal(a, b *resource.Quantity) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Cmp(*b) == 0
}
