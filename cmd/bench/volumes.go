package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/cns"
	cnstypes "github.com/vmware/govmomi/cns/types"
	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/pbm"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/internal/vsphere"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/vmdk"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

const (
	// volumeCallers call Create at once, as the provisioner's workers do.
	volumeCallers = 10
	// volumeTurns are how often one way takes turns with the other.
	volumeTurns   = 10
	benchPassword = "bench volumes"
	benchPolicy   = "bench"
)

// A volumeBench is a vCenter of its own and both ways to make volumes there.
type volumeBench struct {
	vcenter *vcsim.Server
	disks   *vmdk.Disks
	client  *govmomi.Client
	cns     *cns.Client
	store   types.ManagedObjectReference
	policy  string
}

// benchVolumes makes volumes by storage/vmdk, and as many by govmomi's calls one
// after another, in turns.
func benchVolumes(ctx context.Context, n int, all *results) (err error) {
	b, end, err := startVolumeBench(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	say("%d volumes on the simulator, beside a plain loop of govmomi's calls", n)
	var loop, ours struct {
		took  time.Duration
		calls int
	}
	for i := range volumeTurns {
		from, to := n*i/volumeTurns, n*(i+1)/volumeTurns
		start, calls := time.Now(), b.calls()
		if err := b.plain(ctx, from, to); err != nil {
			return err
		}
		loop.took, loop.calls = loop.took+time.Since(start), loop.calls+b.calls()-calls
		start, calls = time.Now(), b.calls()
		if err := b.claims(ctx, from, to); err != nil {
			return err
		}
		ours.took, ours.calls = ours.took+time.Since(start), ours.calls+b.calls()-calls
	}
	all.add("vol_1000_loop", "s", []float64{loop.took.Seconds()})
	made := all.add("vol_1000", "s", []float64{ours.took.Seconds()})
	made.Beside = fmt.Sprintf("%d volumes, %d callers, %.1f calls each; the loop's %.1f", n, volumeCallers, float64(ours.calls)/float64(n), float64(loop.calls)/float64(n))
	made.to(*all, "vol_1000_loop", 1.2)
	return nil
}

// startVolumeBench starts a vCenter and signs in to it twice.
func startVolumeBench(ctx context.Context) (b *volumeBench, end func() error, err error) {
	dir, err := os.MkdirTemp("", "atoll-bench-volumes-")
	if err != nil {
		return nil, nil, err
	}
	quiet := slog.New(slog.DiscardHandler)
	b = &volumeBench{}
	b.vcenter, err = vcsim.New(vcsim.Config{
		Dir: dir, AdminPassword: benchPassword, PasswordRounds: 1000, Logger: quiet,
		Clusters:   []vcsim.Cluster{{Name: "c1", Hosts: []vcsim.Host{{Name: "node-1"}}}},
		Datastores: []vcsim.Datastore{{Name: "d1", Capacity: 1 << 40, Free: 1 << 40}}, Policies: []vcsim.Policy{{Name: benchPolicy}},
	})
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(dir))
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	end = func() error {
		cancel()
		var ran error
		if b.disks != nil {
			ran = <-done
		}
		return errors.Join(ran, b.vcenter.Close(), os.RemoveAll(dir))
	}
	fail := func(err error) (*volumeBench, func() error, error) { return nil, nil, errors.Join(err, end()) }
	if err := b.dial(ctx); err != nil {
		return fail(err)
	}
	d, err := vmdk.New(vmdk.Options{
		VCenter: vsphere.Config{Address: b.vcenter.URL().Host, CA: b.vcenter.CA(), Credentials: func(context.Context) (string, string, error) {
			return "administrator@vsphere.local", benchPassword, nil
		}},
		Cluster: "bench", Instance: func(vm string) (string, error) { return vm, nil }, Logger: quiet,
	})
	if err != nil {
		return fail(err)
	}
	b.disks = d
	go func() { done <- d.Run(ctx) }()
	if _, err := d.Policies(ctx); err != nil {
		return fail(err)
	}
	return b, end, nil
}

// dial signs in as govmomi does, and finds what the loop needs.
func (b *volumeBench) dial(ctx context.Context) error {
	sc := soap.NewClient(b.vcenter.URL(), false)
	authority := x509.NewCertPool()
	authority.AppendCertsFromPEM(b.vcenter.CA())
	sc.DefaultTransport().TLSClientConfig.RootCAs = authority
	vim, err := vim25.NewClient(ctx, sc)
	if err != nil {
		return err
	}
	b.client = &govmomi.Client{Client: vim, SessionManager: session.NewManager(vim)}
	if err := b.client.Login(ctx, url.UserPassword("administrator@vsphere.local", benchPassword)); err != nil {
		return err
	}
	if b.cns, err = cns.NewClient(ctx, vim); err != nil {
		return err
	}
	store, err := find.NewFinder(vim).Datastore(ctx, "/Atoll/datastore/d1")
	if err != nil {
		return err
	}
	b.store = store.Reference()
	policies, err := pbm.NewClient(ctx, vim)
	if err != nil {
		return err
	}
	b.policy, err = policies.ProfileIDByName(ctx, benchPolicy)
	return err
}

// calls that vCenter has answered, or is about to.
func (b *volumeBench) calls() (sum int) {
	for _, n := range b.vcenter.Faults().Calls() {
		sum += n
	}
	return sum
}

// claims has volumes made by several callers.
func (b *volumeBench) claims(ctx context.Context, from, to int) error {
	names := make(chan string)
	var wg sync.WaitGroup
	errs := make([]error, volumeCallers)
	for i := range volumeCallers {
		wg.Go(func() {
			for name := range names {
				_, err := b.disks.Create(ctx, storage.Claim{Name: name, Bytes: 1 << 30, Policy: benchPolicy, Labels: map[string]string{
					storage.LabelNamespace: "bench", storage.LabelPVC: name, storage.LabelPV: name,
				}})
				errs[i] = errors.Join(errs[i], err)
			}
		})
	}
	for i := from; i < to; i++ {
		names <- fmt.Sprintf("pvc-%d", i)
	}
	close(names)
	wg.Wait()
	return errors.Join(errs...)
}

// plain makes such volumes with govmomi's calls, one after the other: no look
// whether there is one, no reading back, one connection, one property collector.
func (b *volumeBench) plain(ctx context.Context, from, to int) error {
	for i := from; i < to; i++ {
		name := fmt.Sprintf("plain-%d", i)
		cluster := cnstypes.CnsContainerCluster{ClusterType: string(cnstypes.CnsClusterTypeKubernetes), ClusterId: "plain", VSphereUser: "Administrator"}
		claim := &cnstypes.CnsKubernetesEntityMetadata{EntityType: string(cnstypes.CnsKubernetesEntityTypePVC), Namespace: "bench"}
		claim.EntityName, claim.ClusterID = name, "plain"
		volume := &cnstypes.CnsKubernetesEntityMetadata{EntityType: string(cnstypes.CnsKubernetesEntityTypePV)}
		volume.EntityName, volume.ClusterID = name, "plain"
		task, err := b.cns.CreateVolume(ctx, []cnstypes.CnsVolumeCreateSpec{{
			Name: name, VolumeType: string(cnstypes.CnsVolumeTypeBlock), Datastores: []types.ManagedObjectReference{b.store},
			Metadata:             cnstypes.CnsVolumeMetadata{ContainerCluster: cluster, EntityMetadata: []cnstypes.BaseCnsEntityMetadata{volume, claim}},
			BackingObjectDetails: &cnstypes.CnsBlockBackingDetails{CnsBackingObjectDetails: cnstypes.CnsBackingObjectDetails{CapacityInMb: 1 << 10}},
			Profile:              []types.BaseVirtualMachineProfileSpec{&types.VirtualMachineDefinedProfileSpec{ProfileId: b.policy}},
		}})
		if err != nil {
			return err
		}
		info, err := task.WaitForResultEx(ctx)
		if err != nil {
			return err
		}
		result, err := cns.GetTaskResult(ctx, info)
		if err != nil {
			return err
		}
		if f := result.GetCnsVolumeOperationResult().Fault; f != nil {
			return fmt.Errorf("volume %s: %s", name, f.LocalizedMessage)
		}
	}
	return nil
}
