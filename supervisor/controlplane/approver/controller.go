package approver

import (
	"context"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
)

// A Controller acts on Judge's verdicts. Its user needs get, list and watch on
// certificatesigningrequests, update on their approval, approve on the signer
// kubernetes.io/kubelet-serving, and get on nodes.
type Controller struct {
	client   kubernetes.Interface
	reserved Reserved
	log      *slog.Logger
	synced   atomic.Bool
}

// New makes a controller; Run starts it.
func New(client kubernetes.Interface, reserved Reserved, log *slog.Logger) *Controller {
	return &Controller{client: client, reserved: reserved, log: log}
}

// Synced says whether the requests that were there have been read.
func (c *Controller) Synced() bool { return c.synced.Load() }

// Run blocks until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	factory := informers.NewSharedInformerFactoryWithOptions(c.client, 0, informers.WithTweakListOptions(func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector("spec.signerName", certificatesv1.KubeletServingSignerName).String()
	}))
	informer := factory.Certificates().V1().CertificateSigningRequests()
	queue := workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](200*time.Millisecond, 5*time.Second))
	enqueue := func(obj any) {
		if csr, ok := obj.(*certificatesv1.CertificateSigningRequest); ok && !decided(csr) {
			queue.Add(csr.Name)
		}
	}
	if _, err := informer.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    enqueue,
		UpdateFunc: func(_, obj any) { enqueue(obj) },
	}); err != nil {
		return fmt.Errorf("approver: %w", err)
	}
	factory.Start(ctx.Done())
	defer factory.Shutdown()
	context.AfterFunc(ctx, queue.ShutDown)
	if !cache.WaitForCacheSync(ctx.Done(), informer.Informer().HasSynced) {
		return nil
	}
	c.synced.Store(true)
	for {
		name, shutdown := queue.Get()
		if shutdown {
			return nil
		}
		csr, err := informer.Lister().Get(name)
		again := false
		if err == nil {
			again, err = c.decide(ctx, csr.DeepCopy())
		}
		switch {
		case apierrors.IsNotFound(err): // deleted meanwhile
			queue.Forget(name)
		case err != nil && ctx.Err() == nil:
			c.log.Warn("certificate request not decided yet", "csr", name, "error", err)
			queue.AddRateLimited(name)
		case again:
			queue.AddRateLimited(name)
		default:
			queue.Forget(name)
		}
		queue.Done(name)
	}
}

// decide judges one request and writes the condition; again means that it
// must be judged once more.
func (c *Controller) decide(ctx context.Context, csr *certificatesv1.CertificateSigningRequest) (again bool, err error) {
	var node *corev1.Node
	if name, ok := NodeName(csr); ok {
		// Read from the API server, not from a cache: the addresses must be
		// at least as new as the request.
		node, err = c.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) || apierrors.IsInvalid(err) || apierrors.IsBadRequest(err) {
			node = nil
		} else if err != nil {
			return true, err
		}
	}
	verdict, reason := c.reserved.Judge(csr, node, time.Now())
	condition := certificatesv1.CertificateSigningRequestCondition{
		Status: corev1.ConditionTrue, Message: "Atoll: " + reason, LastUpdateTime: metav1.Now(),
	}
	switch verdict {
	case Ignore:
		return false, nil
	case Wait:
		return true, nil
	case Approve:
		condition.Type, condition.Reason = certificatesv1.CertificateApproved, "AtollNodeAddressesMatch"
	case Deny:
		condition.Type, condition.Reason = certificatesv1.CertificateDenied, "AtollRefused"
	}
	csr.Status.Conditions = append(csr.Status.Conditions, condition)
	_, err = c.client.CertificatesV1().CertificateSigningRequests().UpdateApproval(ctx, csr.Name, csr, metav1.UpdateOptions{})
	if err != nil {
		return true, err
	}
	c.log.Info("certificate request decided", "csr", csr.Name, "requester", csr.Spec.Username, "verdict", verdict.String(), "reason", reason)
	return false, nil
}
