// Package compliance puts onto claims what nodes say on their volumes: whether
// these are kept as their storage policies say. Nodes may write
// PersistentVolumes and no claims.
package compliance

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/keyqueue"
)

const (
	callTimeout = 30 * time.Second
	// A claim that cannot be written is tried again after firstPause, doubling
	// up to lastPause.
	firstPause = 200 * time.Millisecond
	lastPause  = time.Minute
)

// copied are the annotations that a claim has of its volume.
var copied = []string{v1alpha1.AnnotationPolicyCompliance, v1alpha1.AnnotationPolicyComplianceReason}

// A Controller keeps the annotations of claims.
type Controller struct {
	client  kubernetes.Interface
	log     *slog.Logger
	factory informers.SharedInformerFactory
	volumes corelisters.PersistentVolumeLister
	claims  corelisters.PersistentVolumeClaimLister
	queue   keyqueue.Queue // names of PersistentVolumes
}

// New returns a Controller that does nothing before Run. The client has the
// rights of atoll:compliance; log may be nil.
func New(client kubernetes.Interface, log *slog.Logger) (*Controller, error) {
	if client == nil {
		return nil, fmt.Errorf("compliance: a client is required: %w", errdefs.ErrInvalidArgument)
	}
	if log == nil {
		log = slog.Default()
	}
	c := &Controller{
		client: client, log: log.With("component", "compliance"),
		factory: informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(lean)),
		queue:   keyqueue.New(firstPause, lastPause),
	}
	core := c.factory.Core().V1()
	c.volumes, c.claims = core.PersistentVolumes().Lister(), core.PersistentVolumeClaims().Lister()
	keyqueue.Handle(core.PersistentVolumes().Informer(), func(pv *corev1.PersistentVolume) { c.queue.Add(pv.Name) })
	keyqueue.Handle(core.PersistentVolumeClaims().Informer(), func(claim *corev1.PersistentVolumeClaim) {
		if claim.Spec.VolumeName != "" {
			c.queue.Add(claim.Spec.VolumeName)
		}
	})
	return c, nil
}

// lean keeps in memory what is read here: names and annotations, and which
// claim has which volume.
func lean(o any) (any, error) {
	meta := func(m *metav1.ObjectMeta) metav1.ObjectMeta {
		slim := metav1.ObjectMeta{Name: m.Name, Namespace: m.Namespace, UID: m.UID, ResourceVersion: m.ResourceVersion}
		for _, k := range copied {
			if v, ok := m.Annotations[k]; ok {
				metav1.SetMetaDataAnnotation(&slim, k, v)
			}
		}
		return slim
	}
	switch o := o.(type) {
	case *corev1.PersistentVolume:
		return &corev1.PersistentVolume{ObjectMeta: meta(&o.ObjectMeta), Spec: corev1.PersistentVolumeSpec{ClaimRef: o.Spec.ClaimRef}}, nil
	case *corev1.PersistentVolumeClaim:
		return &corev1.PersistentVolumeClaim{ObjectMeta: meta(&o.ObjectMeta), Spec: corev1.PersistentVolumeClaimSpec{VolumeName: o.Spec.VolumeName}}, nil
	}
	return o, nil
}

// Run keeps the annotations until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	c.factory.Start(ctx.Done())
	defer c.factory.Shutdown()
	for _, ok := range c.factory.WaitForCacheSync(ctx.Done()) {
		if !ok {
			return nil // only ctx ends the wait for a first list
		}
	}
	keyqueue.Run(ctx, c.queue, c.log, "pv", c.sync)
	return nil
}

// sync has the claim of a volume say what the volume does. A volume that says
// nothing changes nothing: another may speak for it.
func (c *Controller) sync(ctx context.Context, name string) error {
	pv, err := c.volumes.Get(name)
	if err != nil || pv.Spec.ClaimRef == nil || pv.Annotations[v1alpha1.AnnotationPolicyCompliance] == "" {
		return client.IgnoreNotFound(err)
	}
	claim, err := c.claims.PersistentVolumeClaims(pv.Spec.ClaimRef.Namespace).Get(pv.Spec.ClaimRef.Name)
	if err != nil || claim.UID != pv.Spec.ClaimRef.UID || claim.Spec.VolumeName != name {
		return client.IgnoreNotFound(err)
	}
	change := map[string]any{}
	for _, k := range copied {
		want, wanted := pv.Annotations[k]
		if have, has := claim.Annotations[k]; have == want && has == wanted {
			continue
		}
		change[k] = nil // null takes it away
		if wanted {
			change[k] = want
		}
	}
	if len(change) == 0 {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": claim.UID, "annotations": change}})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err = c.client.CoreV1().PersistentVolumeClaims(claim.Namespace).Patch(ctx, claim.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	if apierrors.IsConflict(err) { // another claim of that name: it comes with its own event
		return nil
	}
	return client.IgnoreNotFound(err)
}
