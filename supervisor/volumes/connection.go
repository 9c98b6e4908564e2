package volumes

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/client-go/informers"
	toolscache "k8s.io/client-go/tools/cache"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/vsphere"
	atollcsi "github.com/openatoll/atoll/storage/csi"
	"github.com/openatoll/atoll/storage/csi/controllers"
)

// A signal wakes whoever listens now.
type signal struct{ state *signalState }

type signalState struct {
	mu        sync.Mutex
	listeners map[chan struct{}]bool
}

func newSignal() signal { return signal{&signalState{listeners: map[chan struct{}]bool{}}} }

func (s signal) tell() {
	s.state.mu.Lock()
	defer s.state.mu.Unlock()
	for c := range s.state.listeners {
		poke(c)
	}
}

func (s signal) listen(c chan struct{}) (stop func()) {
	s.state.mu.Lock()
	defer s.state.mu.Unlock()
	s.state.listeners[c] = true
	return func() {
		s.state.mu.Lock()
		defer s.state.mu.Unlock()
		delete(s.state.listeners, c)
	}
}

// A connection serves the volumes of one vCenter.
type connection struct {
	*base
	address    string
	every      time.Duration // between surveys without a cause
	store      Store
	driver     *atollcsi.Driver
	factory    informers.SharedInformerFactory
	wake       chan struct{}          // has volumes surveyed soon
	supervisor *v1alpha1.Supervisor   // has events about orphans
	orphans    map[string]time.Time   // by ID, when they were first seen
	reported   map[string]string      // by ID, what was told of an orphan
	instance   atomic.Pointer[string] // vCenter's UUID when it was asked last
}

func (b *base) connect(sup *v1alpha1.Supervisor) (*connection, error) {
	v, secret := sup.Spec.VCenter, sup.Spec.VCenter.CredentialsSecret
	store, err := b.options.Open(vsphere.Config{
		Address: v.Server, CA: v.CABundle, Thumbprint: v.Thumbprint, UserAgent: component,
		Credentials: vsphere.FromSecret(secret.Namespace, secret.Name, b.secret), Observe: vcenterCall,
	}, b.cluster, b.policyName)
	if err != nil {
		return nil, err
	}
	driver, err := atollcsi.New(atollcsi.Config{Disks: store, Logger: b.log})
	if err != nil {
		return nil, err
	}
	return &connection{
		base: b, address: v.Server, every: time.Duration(sup.Spec.PolicyPollSeconds) * time.Second, store: store, driver: driver,
		factory: controllers.NewFactory(b.client), wake: make(chan struct{}, 1), supervisor: sup.DeepCopy(),
		orphans: map[string]time.Time{}, reported: map[string]string{},
	}, nil
}

// start returns at once; stop, when everything has ended.
func (c *connection) start(parent context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(parent)
	var wg sync.WaitGroup
	run := func(what string, f func(context.Context) error) {
		wg.Go(func() {
			if err := f(ctx); err != nil && ctx.Err() == nil {
				c.log.Error(what+" ended", "vcenter", c.address, "err", err)
				poke(c.failed)
			}
		})
	}
	c.watchClaims()
	run("the watch of vCenter", c.store.Run)
	run("the controllers of volumes", func(ctx context.Context) error {
		return controllers.Run(ctx, controllers.Config{
			Client: c.options.Config, Scope: &scope{c}, Controller: c.driver.Controller(), Component: component, Factory: c.factory, Logger: c.options.Logger,
		})
	})
	run("the survey of volumes", c.survey)
	c.log.Info("volumes of vCenter are served", "vcenter", c.address)
	return func() {
		cancel()
		wg.Wait()
		forgetVolumes()
	}
}

// watchClaims has volumes surveyed when a claim was bound, or its labels changed,
// and when a PersistentVolume came or went.
func (c *connection) watchClaims() {
	_, _ = c.factory.Core().V1().PersistentVolumeClaims().Informer().AddEventHandler(toolscache.ResourceEventHandlerFuncs{
		AddFunc: func(o any) { c.claimChanged(nil, o) }, UpdateFunc: c.claimChanged,
	})
	_, _ = c.factory.Core().V1().PersistentVolumes().Informer().AddEventHandler(toolscache.ResourceEventHandlerFuncs{
		AddFunc: func(o any) { c.volumeChanged(nil, o) }, UpdateFunc: c.volumeChanged,
		DeleteFunc: func(o any) {
			if gone, ok := o.(toolscache.DeletedFinalStateUnknown); ok {
				o = gone.Obj
			}
			c.volumeChanged(nil, o)
		},
	})
}
