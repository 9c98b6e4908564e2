package controllers

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/storage"
)

const (
	// auditPeriod is how often every volume is looked at: nobody tells when a
	// file changes, or a datastore goes.
	auditPeriod = time.Minute
	// auditAfter is how long after a new volume or a change that was seen, so that
	// many cost one look, and pods start first.
	auditAfter = 3 * time.Second
	// auditTimeout bounds one look. A file system that hangs is not asked again
	// while it does.
	auditTimeout = 10 * time.Second
	// maxReason is how much is said of why, in bytes.
	maxReason = 1024

	reasonCompliant    = "PolicyCompliant"
	reasonNotCompliant = "PolicyNotCompliant"
	reasonUnknown      = "PolicyComplianceUnknown"
)

// auditController says on each PersistentVolume that the node reaches whether
// it is kept as its policy says, and tells the claim's owner when that changes.
// The supervisor puts it onto the claim (supervisor/compliance): nodes may not
// write claims.
type auditController struct {
	*group
	wake chan struct{}
	// asked are questions without an answer yet, by datastore.
	asked map[string]chan storage.Compliance
}

func newAuditController(g *group) *auditController {
	a := &auditController{group: g, wake: make(chan struct{}, 1), asked: map[string]chan storage.Compliance{}}
	_, _ = g.factory.Core().V1().PersistentVolumes().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: func(any) {
		select {
		case a.wake <- struct{}{}:
		default:
		}
	}})
	return a
}

func (a *auditController) run(ctx context.Context) {
	if a.Auditor == nil {
		return
	}
	for {
		if err := a.pass(ctx); err != nil && ctx.Err() == nil {
			a.Logger.Warn("whether volumes comply with their policies could not be written; trying again", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(auditPeriod):
			continue
		case <-a.wake:
		case <-a.Changed:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(auditAfter):
		}
	}
}

// pass looks at every volume once. The error is the last one; it ends nothing.
func (a *auditController) pass(ctx context.Context) (failed error) {
	all, err := a.factory.Core().V1().PersistentVolumes().Lister().List(labels.Everything())
	if err != nil {
		return err
	}
	for _, pv := range all {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !a.mine(pv) || pv.DeletionTimestamp != nil || pv.Status.Phase == corev1.VolumeReleased {
			continue
		}
		if err := a.look(ctx, pv); err != nil {
			failed = fmt.Errorf("volume %s: %w", pv.Name, err)
		}
	}
	return failed
}

// look judges one volume, and writes what is new.
func (a *auditController) look(ctx context.Context, pv *corev1.PersistentVolume) error {
	c := a.judge(ctx, pv.Spec.CSI.VolumeHandle)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	was, said := pv.Annotations[v1alpha1.AnnotationPolicyCompliance], pv.Annotations[v1alpha1.AnnotationPolicyComplianceReason]
	by := pv.Annotations[v1alpha1.AnnotationPolicyComplianceBy]
	if was == string(c.State) && said == c.Message {
		return nil
	}
	if by != "" && by != a.NodeName {
		if other, err := a.works(ctx, by); err != nil || other {
			return err // of several that reach it, one has the word
		}
	}
	var reason any // null takes the annotation away
	if c.Message != "" {
		reason = c.Message
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": pv.UID, "annotations": map[string]any{
		v1alpha1.AnnotationPolicyCompliance: c.State, v1alpha1.AnnotationPolicyComplianceReason: reason, v1alpha1.AnnotationPolicyComplianceBy: a.NodeName,
	}}})
	if err != nil {
		return err
	}
	_, err = a.client.CoreV1().PersistentVolumes().Patch(ctx, pv.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	if err != nil {
		if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
			return nil // it has gone
		}
		return err
	}
	a.tell(pv, was, c)
	return nil
}

// tell says on the claim what has changed.
func (a *auditController) tell(pv *corev1.PersistentVolume, was string, c storage.Compliance) {
	if pv.Spec.ClaimRef == nil {
		return
	}
	claim := *pv.Spec.ClaimRef
	claim.Kind, claim.APIVersion = "PersistentVolumeClaim", "v1"
	switch c.State {
	case storage.Compliant:
		if was != "" {
			a.events.Event(&claim, corev1.EventTypeNormal, reasonCompliant, "volume "+pv.Name+" is kept as its storage policy says again")
		}
	case storage.NonCompliant:
		a.events.Event(&claim, corev1.EventTypeWarning, reasonNotCompliant, "volume "+pv.Name+" is not kept as its storage policy says: "+c.Message)
	default:
		a.events.Event(&claim, corev1.EventTypeWarning, reasonUnknown, "whether volume "+pv.Name+" is kept as its storage policy says is not known: "+c.Message)
	}
	a.Logger.Info("compliance of a volume has changed", "volume", pv.Spec.CSI.VolumeHandle, "pv", pv.Name, "was", was, "is", c.State, "reason", c.Message)
}

// judge asks the back end, and does not wait for a datastore that hangs.
func (a *auditController) judge(ctx context.Context, id string) storage.Compliance {
	datastore, _, _ := strings.Cut(id, ".")
	silent := storage.Compliance{State: storage.ComplianceUnknown, Message: "its datastore does not answer"}
	if open := a.asked[datastore]; open != nil {
		select {
		case <-open:
			delete(a.asked, datastore)
		default:
			return silent
		}
	}
	answer := make(chan storage.Compliance, 1)
	go func() { answer <- a.ask(ctx, id) }()
	select {
	case c := <-answer:
		return c
	case <-ctx.Done():
	case <-time.After(auditTimeout):
		a.asked[datastore] = answer
	}
	return silent
}

func (a *auditController) ask(ctx context.Context, id string) storage.Compliance {
	c, err := a.Auditor.Compliance(ctx, id)
	switch {
	case errdefs.IsNotFound(err):
		c = storage.Compliance{State: storage.NonCompliant, Message: "its datastore has no such volume: " + err.Error()}
	case err != nil:
		c = storage.Compliance{State: storage.ComplianceUnknown, Message: err.Error()}
	}
	if len(c.Message) > maxReason {
		c.Message = strings.ToValidUTF8(c.Message[:maxReason], "")
	}
	return c
}
