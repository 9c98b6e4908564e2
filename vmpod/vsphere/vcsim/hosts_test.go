package vcsim

import (
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// clusterOf reads what a client sees of the cluster c1.
func clusterSeen(t *testing.T, c *govmomi.Client) (hosts []mo.HostSystem, cluster mo.ClusterComputeResource, root mo.ResourcePool) {
	t.Helper()
	found := must[*object.ClusterComputeResource](t)(find.NewFinder(c.Client).ClusterComputeResource(t.Context(), "/Atoll/host/c1"))
	if err := found.Properties(t.Context(), found.Reference(), []string{"host", "summary", "datastore"}, &cluster); err != nil {
		t.Fatal(err)
	}
	pc := property.DefaultCollector(c.Client)
	if err := pc.Retrieve(t.Context(), cluster.Host, []string{"name", "summary", "runtime", "datastore", "vm", "hardware"}, &hosts); err != nil {
		t.Fatal(err)
	}
	if err := rootPool(t, c).Properties(t.Context(), rootPool(t, c).Reference(), []string{"config", "runtime"}, &root); err != nil {
		t.Fatal(err)
	}
	return hosts, cluster, root
}

func hostNamed(hosts []mo.HostSystem, name string) *mo.HostSystem {
	for i := range hosts {
		if hosts[i].Name == name {
			return &hosts[i]
		}
	}
	return nil
}

// TestHostThatJoins is one life: shown with what it has, with pods, not heard
// of, kept over a kill, gone.
func TestHostThatJoins(t *testing.T) {
	dir := t.TempDir()
	s := start(t, config(dir))
	c := signIn(t, s, admin)
	ctx := t.Context()
	pool := must[*object.ResourcePool](t)(rootPool(t, c).Create(ctx, "team", spec()))
	late := Host{Name: "late.example.org", CPUs: 4, MHz: 3000, Memory: 16 << 30}
	if _, err := s.Mirror(ctx, Mirror{UUID: podUUID, Name: "web", CPUs: 1, MemoryMiB: 64, Host: late.Name}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a mirror on a host that is not there: %v", err)
	}
	if err := s.ShowHost(ctx, "c2", late); !errdefs.IsNotFound(err) {
		t.Errorf("a cluster that is not there: %v", err)
	}
	if err := s.ShowHost(ctx, "c1", Host{Name: "a/b"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a name that no host can have: %v", err)
	}
	for range 2 { // the second time changes nothing
		if err := s.ShowHost(ctx, "c1", late); err != nil {
			t.Fatal(err)
		}
	}
	id := must[string](t)(s.Mirror(ctx, Mirror{UUID: podUUID, Name: "web", CPUs: 1, MemoryMiB: 64, Host: late.Name, Pool: pool.Reference().Value}))
	hosts, cluster, root := clusterSeen(t, c)
	h := hostNamed(hosts, late.Name)
	if len(hosts) != 3 || h == nil {
		t.Fatalf("%d hosts: %v", len(hosts), hosts)
	}
	if hw := h.Summary.Hardware; hw.NumCpuCores != 4 || hw.CpuMhz != 3000 || hw.MemorySize != 16<<30 || h.Hardware.MemorySize != 16<<30 || h.Runtime.ConnectionState != "connected" || len(h.Vm) != 1 || h.Vm[0].Value != id {
		t.Errorf("the host: %+v, %s, VMs %v", hw, h.Runtime.ConnectionState, h.Vm)
	}
	if len(h.Datastore) != 1 || h.Datastore[0] != s.inventory.stores["atoll"] {
		t.Errorf("its datastores: %v", h.Datastore)
	}
	if sum := cluster.Summary.(*types.ClusterComputeResourceSummary); sum.NumHosts != 3 || sum.TotalCpu != 2*8*2000+4*3000 || *root.Config.CpuAllocation.Limit != int64(sum.TotalCpu) {
		t.Errorf("the cluster: %+v, its pool %d MHz", sum, *root.Config.CpuAllocation.Limit)
	}
	var team mo.ResourcePool
	if err := pool.Properties(ctx, pool.Reference(), []string{"runtime"}, &team); err != nil || team.Runtime.Memory.MaxUsage != 80<<30 {
		t.Errorf("a pool of it may use %d (%v)", team.Runtime.Memory.MaxUsage, err)
	}

	late.State = HostNotResponding
	if err := s.ShowHost(ctx, "c1", late); err != nil {
		t.Fatal(err)
	}
	hosts, cluster, _ = clusterSeen(t, c)
	if h := hostNamed(hosts, late.Name); h.Runtime.ConnectionState != types.HostSystemConnectionStateNotResponding || h.Summary.Runtime.ConnectionState != h.Runtime.ConnectionState || cluster.Summary.GetComputeResourceSummary().NumEffectiveHosts != 2 {
		t.Errorf("not heard of: %s, %s", h.Runtime.ConnectionState, h.Summary.Runtime.ConnectionState)
	}

	before, ref := asJSON(t, picture(t, s)), h.Self
	from := t.TempDir() // what a killed process leaves
	if err := os.CopyFS(from, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	s = start(t, config(from))
	c = signIn(t, s, admin)
	if after := asJSON(t, picture(t, s)); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	hosts, _, _ = clusterSeen(t, c)
	h = hostNamed(hosts, late.Name)
	if h == nil || h.Self != ref || h.Summary.Hardware.MemorySize != 16<<30 || h.Runtime.ConnectionState != types.HostSystemConnectionStateNotResponding || len(h.Vm) != 1 {
		t.Fatalf("after a restart: %+v", h)
	}

	if err := s.RemoveHost(ctx, late.Name); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("removed with a pod's VM: %v", err)
	}
	if err := s.Unmirror(ctx, podUUID); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.RemoveHost(ctx, late.Name); err != nil {
			t.Fatal(err)
		}
	}
	hosts, cluster, _ = clusterSeen(t, c)
	if len(hosts) != 2 || cluster.Summary.GetComputeResourceSummary().NumHosts != 2 || len(s.Hosts()) != 0 {
		t.Errorf("left are %d hosts, %v", len(hosts), s.Hosts())
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = start(t, config(from))
	if hosts, _, _ = clusterSeen(t, signIn(t, s, admin)); len(hosts) != 2 {
		t.Errorf("back after a restart: %d hosts", len(hosts))
	}
}

// TestHostOfTheConfiguration is changed, and stays; one that ShowHost added and
// the configuration has later is the configuration's.
func TestHostOfTheConfiguration(t *testing.T) {
	dir := t.TempDir()
	s := start(t, config(dir))
	ctx := t.Context()
	for _, h := range []Host{{Name: "node-1", Memory: 64 << 30, State: HostTroubled}, {Name: "node-3", CPUs: 1}} {
		if err := s.ShowHost(ctx, "c1", h); err != nil {
			t.Fatal(err)
		}
	}
	c := signIn(t, s, admin)
	hosts, _, _ := clusterSeen(t, c)
	if h := hostNamed(hosts, "node-1"); h.Summary.Hardware.MemorySize != 64<<30 || h.Summary.Hardware.NumCpuCores != 8 || h.Summary.OverallStatus != "yellow" || h.Runtime.ConnectionState != "connected" {
		t.Errorf("changed: %+v %s", h.Summary.Hardware, h.Summary.OverallStatus)
	}
	if err := s.RemoveHost(ctx, "node-1"); err != nil {
		t.Fatal(err)
	}
	hosts, _, _ = clusterSeen(t, c)
	if h := hostNamed(hosts, "node-1"); h == nil || h.Runtime.ConnectionState != types.HostSystemConnectionStateNotResponding {
		t.Errorf("removed: %+v", h)
	}
	if got := s.Hosts(); len(got) != 1 || got[0] != "node-3" {
		t.Errorf("added were %v", got)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	more := config(dir)
	more.Clusters[0].Hosts = append(more.Clusters[0].Hosts, Host{Name: "node-3", CPUs: 2})
	s = start(t, more)
	hosts, _, _ = clusterSeen(t, signIn(t, s, admin))
	if h := hostNamed(hosts, "node-3"); len(hosts) != 3 || h.Summary.Hardware.NumCpuCores != 2 || len(s.Hosts()) != 0 {
		t.Errorf("%d hosts, %+v, added %v", len(hosts), h.Summary.Hardware, s.Hosts())
	}
}
