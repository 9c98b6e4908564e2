package podmirror

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"reflect"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"

	"github.com/openatoll/atoll/api/v1alpha1"
)

const (
	// workers is how many mirrors change at once.
	workers = 4
	// callTimeout bounds one change of a mirror, and one call of the API.
	callTimeout = 30 * time.Second
	// A mirror that cannot be made is tried again after firstPause, doubling up
	// to lastPause, each a random part of itself longer.
	firstPause = 200 * time.Millisecond
	lastPause  = time.Minute
)

// Options is what Run and New need.
type Options struct {
	// Client and Dynamic have the rights of atoll:pod-mirror.
	Client  kubernetes.Interface
	Dynamic dynamic.Interface
	// Inventory shows the mirrors.
	Inventory Inventory
	// Logger; default slog.Default().
	Logger *slog.Logger
}

// A Controller keeps an inventory's mirrors as the Pods are. One Controller an
// inventory: whoever serves the inventory runs it.
type Controller struct {
	o        Options
	log      *slog.Logger
	recorder record.EventRecorder
	caches   *caches
	queue    workqueue.TypedRateLimitingInterface[types.NamespacedName]
	hosts    hosts

	mu sync.Mutex
	// shown is what the inventory was last told, by pod.
	shown map[types.NamespacedName]shown
	// waiting is closed and removed when a mirror changes; see Power.
	waiting map[string]chan struct{}
}

type shown struct {
	vm  VM
	ref Ref
}

// Run keeps the mirrors until ctx ends. It is ErrInvalidArgument if something
// is missing in o.
func Run(ctx context.Context, o Options) error {
	c, err := New(o)
	if err != nil {
		return err
	}
	return c.Run(ctx)
}

// New returns a Controller that does nothing before Run.
func New(o Options) (*Controller, error) {
	if o.Client == nil || o.Dynamic == nil || o.Inventory == nil {
		return nil, fmt.Errorf("podmirror: Client, Dynamic and Inventory are required: %w", errdefs.ErrInvalidArgument)
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	c := &Controller{
		o: o, log: o.Logger.With("component", "podmirror"),
		queue:   newQueue[types.NamespacedName](),
		hosts:   hosts{queue: newQueue[string](), shown: map[string]Host{}},
		shown:   map[types.NamespacedName]shown{},
		waiting: map[string]chan struct{}{},
	}
	var err error
	c.caches, err = newCaches(o, c.queue.Add, c.hosts.queue.Add)
	return c, err
}

func newQueue[K comparable]() workqueue.TypedRateLimitingInterface[K] {
	return workqueue.NewTypedRateLimitingQueue[K](jitter[K]{workqueue.NewTypedItemExponentialFailureRateLimiter[K](firstPause, lastPause)})
}

// jitter keeps what failed together from being tried together.
type jitter[K comparable] struct {
	workqueue.TypedRateLimiter[K]
}

func (j jitter[K]) When(key K) time.Duration {
	d := j.TypedRateLimiter.When(key)
	return d + rand.N(d/2+1)
}

// Run keeps the mirrors until ctx ends; a second call is no use.
func (c *Controller) Run(ctx context.Context) error {
	registerMetrics()
	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: c.o.Client.CoreV1().Events("")})
	c.mu.Lock()
	c.recorder = broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "atoll-pod-mirror"})
	c.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { c.queue.ShutDown(); c.hosts.queue.ShutDown() })
	defer stop()
	if err := c.caches.start(ctx); err != nil {
		return nil // only ctx ends the wait for a first list
	}
	c.log.Info("pods are known", "pods", len(c.caches.pods.ListKeys()))
	if err := c.sweep(ctx); err != nil {
		return nil
	}
	var all sync.WaitGroup
	all.Go(func() {
		for c.nextHost(ctx) {
		}
	})
	for range workers {
		all.Go(func() {
			for c.next(ctx) {
			}
		})
	}
	all.Wait()
	return nil
}

// sweep takes mirrors away that no pod has any more, once at the start: what
// was deleted while nobody watched. Lists are complete by now; while the
// inventory's cannot be had, it is asked for again. It ends early only with ctx.
func (c *Controller) sweep(ctx context.Context) error {
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		err := c.sweepOnce(ctx)
		if err == nil {
			return nil
		}
		c.log.Warn("mirrors of earlier times could not be looked through, trying again", "err", err)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause + rand.N(pause/2+1)):
		}
	}
}

func (c *Controller) sweepOnce(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	there, err := c.o.Inventory.Mirrored(ctx)
	if err != nil {
		return err
	}
	names, err := c.o.Inventory.Hosts(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		c.hosts.queue.Add(name) // its node may be gone
	}
	wanted := map[string]bool{}
	for _, o := range c.caches.pods.List() {
		if vm, _, ok := c.want(o.(*corev1.Pod)); ok {
			wanted[vm.UUID] = true
		}
	}
	var errs []error
	for _, uuid := range there {
		if wanted[uuid] {
			continue
		}
		err := c.o.Inventory.Unmirror(ctx, uuid)
		count(opUnmirror, err)
		if err == nil {
			c.log.Info("mirror of a pod that is gone taken away", "vm_uuid", uuid)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (c *Controller) next(ctx context.Context) bool {
	key, shutdown := c.queue.Get()
	if shutdown {
		return false
	}
	defer c.queue.Done(key)
	began := time.Now()
	err := c.reconcile(ctx, key)
	switch {
	case err == nil:
		c.queue.Forget(key)
		reconcileSeconds.WithLabelValues().Observe(time.Since(began).Seconds())
	case ctx.Err() == nil:
		level := slog.LevelWarn
		if c.queue.NumRequeues(key) > 0 {
			level = slog.LevelDebug // the counter goes on
		}
		c.log.Log(ctx, level, "mirror of a pod is not as the pod, trying again", "pod", key.String(), "err", err)
		c.queue.AddRateLimited(key)
	}
	return true
}

// want is what the inventory should show of a pod, if anything.
func (c *Controller) want(pod *corev1.Pod) (vm VM, uid types.UID, ok bool) {
	at, ok := c.caches.place(pod)
	if !ok {
		return VM{}, "", false
	}
	vm, ok = vmOf(pod, at)
	return vm, pod.UID, ok
}

// reconcile makes one pod's mirror what it should be. The queue never gives one
// key to two workers.
func (c *Controller) reconcile(ctx context.Context, key types.NamespacedName) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var pod *corev1.Pod
	var vm VM
	wanted := false
	if o, exists, err := c.caches.pods.GetByKey(key.String()); err != nil {
		return err
	} else if exists {
		pod = o.(*corev1.Pod)
		vm, _, wanted = c.want(pod)
	}
	c.mu.Lock()
	old, had := c.shown[key]
	c.mu.Unlock()
	// Another VM of the pod, or of a later pod of the name, wants the same name
	// in the folder.
	if had && (!wanted || old.vm.UUID != vm.UUID) {
		err := c.o.Inventory.Unmirror(ctx, old.vm.UUID)
		count(opUnmirror, err)
		if err != nil {
			return fmt.Errorf("take the mirror %s away: %w", old.vm.UUID, err)
		}
		c.note(key, old.vm.UUID, nil)
		if c.hosts.queue.NumRequeues(old.vm.Host) > 0 {
			c.hosts.queue.Add(old.vm.Host) // it waits to go
		}
		old = shown{}
	}
	if !wanted {
		return nil
	}
	ref := old.ref
	if !reflect.DeepEqual(old.vm, vm) {
		var err error
		ref, err = c.o.Inventory.Mirror(ctx, vm)
		count(opMirror, err)
		if err != nil {
			return fmt.Errorf("mirror VM %s: %w", vm.UUID, err)
		}
		c.note(key, vm.UUID, &shown{vm, ref})
	}
	return c.annotate(ctx, pod, ref)
}

// note remembers what the inventory shows now, and wakes who waits for that.
func (c *Controller) note(key types.NamespacedName, uuid string, now *shown) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now == nil {
		delete(c.shown, key)
	} else {
		c.shown[key] = *now
	}
	mirrors.Set(float64(len(c.shown)))
	if w := c.waiting[uuid]; w != nil {
		close(w)
		delete(c.waiting, uuid)
	}
}

// annotate writes the mirror's name onto the Pod unless it is there.
func (c *Controller) annotate(ctx context.Context, pod *corev1.Pod, ref Ref) error {
	value := ref.MoID + ":" + ref.VCenter
	if ref.MoID == "" || pod.Annotations[v1alpha1.PodVMMoIDAnnotation] == value {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": pod.UID, "annotations": map[string]string{v1alpha1.PodVMMoIDAnnotation: value},
	}})
	if err != nil {
		return err
	}
	_, err = c.o.Client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil // gone, and the cache will say so
	}
	return err
}

// podKey names a Pod in the queue and the cache.
func podKey(o any) (types.NamespacedName, bool) {
	if gone, ok := o.(cache.DeletedFinalStateUnknown); ok {
		o = gone.Obj
	}
	pod, ok := o.(*corev1.Pod)
	if !ok {
		return types.NamespacedName{}, false
	}
	return types.NamespacedName{Namespace: pod.Namespace, Name: pod.Name}, true
}
