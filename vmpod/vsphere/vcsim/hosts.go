package vcsim

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/simulator/esx"
	"github.com/vmware/govmomi/vim25/types"
)

// A HostState is how a host is, for those who look at it.
type HostState string

// States of a host.
const (
	HostConnected     HostState = ""              // and well
	HostTroubled      HostState = "troubled"      // connected, and says itself that something is wrong
	HostNotResponding HostState = "notResponding" // nobody hears of it; the cluster does not count on it
)

// maxHostName is the longest name of a DNS name, which nodes have.
const maxHostName = 253

// ShowHost has a cluster show a host as h says. It adds one that is not there,
// with the cluster's datastores, and changes one that is, wherever it is; what
// h does not know (0) stays as it was. What was added stays over restarts.
// A cluster that is not there is ErrNotFound.
func (s *Server) ShowHost(_ context.Context, cluster string, h Host) error {
	if h.Name == "" || len(h.Name) > maxHostName || strings.ContainsAny(h.Name, "/\\%\n") {
		return fmt.Errorf("vcsim: host name %q: 1 to %d characters, without / \\ %%: %w", h.Name, maxHostName, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	ref, known := s.inventory.hosts[h.Name]
	if !known {
		c := s.clusterNamed(cluster)
		if c == nil {
			return fmt.Errorf("vcsim: host %q: there is no cluster %q: %w", h.Name, cluster, errdefs.ErrNotFound)
		}
		ref = s.putHost(types.ManagedObjectReference{Type: "HostSystem"}, c, h)
		s.hostEvent(&types.HostAddedEvent{}, ref, "Added host "+h.Name)
	} else if !s.describeHost(ref, h) {
		return nil
	}
	s.resize(s.clusterOf(ref))
	return s.save(ref)
}

// RemoveHost takes away a host that ShowHost added. One of the configuration
// stays, as not responding. So does one that has mirrors, and the error is
// ErrFailedPrecondition until they are gone. One that is not there is gone.
func (s *Server) RemoveHost(_ context.Context, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	ref, known := s.inventory.hosts[name]
	if !known {
		return nil
	}
	cluster := s.clusterOf(ref)
	if s.describeHost(ref, Host{Name: name, State: HostNotResponding}) {
		s.resize(cluster)
		if err := s.save(ref); err != nil {
			return err
		}
	}
	if s.fixed(ref) {
		return nil
	}
	if n := s.countVMs(ref); n > 0 {
		return fmt.Errorf("vcsim: host %q stays while it has %d virtual machines: %w", name, n, errdefs.ErrFailedPrecondition)
	}
	s.hostEvent(&types.HostRemovedEvent{}, ref, "Removed host "+name)
	s.dropHost(ref, cluster)
	s.resize(cluster)
	return s.save(ref)
}

// Hosts returns the names of those that ShowHost added, in order.
func (s *Server) Hosts() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for _, h := range s.inventory.shown {
		names = append(names, h.Name)
	}
	slices.Sort(names)
	return names
}

// The rest wants s.mu held.

func (s *Server) clusterNamed(name string) *simulator.ClusterComputeResource {
	for _, e := range s.vim.All("ClusterComputeResource") {
		if c, ok := e.(*simulator.ClusterComputeResource); ok && s.nameOf(c.Self) == name {
			return c
		}
	}
	return nil
}

func (s *Server) clusterOf(host types.ManagedObjectReference) *simulator.ClusterComputeResource {
	return s.vim.Get(s.parent(host)).(*simulator.ClusterComputeResource)
}

// putHost adds a host; ref may hold the id it had before.
func (s *Server) putHost(ref types.ManagedObjectReference, c *simulator.ClusterComputeResource, h Host) types.ManagedObjectReference {
	template := esx.HostSystem
	template.Network = slices.Clone(c.Network[:min(1, len(c.Network))])
	host := simulator.NewHostSystem(s.simulated(), template)
	host.Self = ref
	if ref.Value == "" { // known before anyone can see it
		s.vim.NewEntity(host)
	}
	id := uuid.NewSHA1(uuid.NameSpaceOID, []byte("host/"+h.Name)).String()
	host.Name, host.Summary.Config.Name = h.Name, h.Name
	host.Summary.Hardware.Uuid, host.Hardware.SystemInfo.Uuid = id, id
	host.Summary.Host, host.Config.Host = &host.Self, host.Self
	host.AvailableField = s.availableFields("HostSystem")
	for _, name := range sortedKeys(s.inventory.stores) {
		host.Datastore = append(host.Datastore, s.inventory.stores[name])
	}
	s.vim.PutEntity(c, host)
	s.inventory.hosts[h.Name] = host.Self
	s.inventory.shown[host.Self] = h
	s.describeHost(host.Self, h)
	s.update(c, set("host", append(slices.Clone(c.Host), host.Self)))
	for _, store := range host.Datastore {
		s.mount(store, func(all []types.DatastoreHostMount) []types.DatastoreHostMount {
			return append(all, types.DatastoreHostMount{Key: host.Self, MountInfo: types.HostMountInfo{
				AccessMode: string(types.HostMountModeReadWrite), Mounted: types.NewBool(true), Accessible: types.NewBool(true),
			}})
		})
	}
	return host.Self
}

// dropHost undoes putHost.
func (s *Server) dropHost(ref types.ManagedObjectReference, c *simulator.ClusterComputeResource) {
	host := s.vim.Get(ref).(*simulator.HostSystem)
	s.update(c, set("host", without(slices.Clone(c.Host), ref)))
	for _, store := range host.Datastore {
		s.mount(store, func(all []types.DatastoreHostMount) []types.DatastoreHostMount {
			return slices.DeleteFunc(all, func(m types.DatastoreHostMount) bool { return m.Key == ref })
		})
	}
	m := host.ConfigManager // what NewHostSystem made
	for _, part := range []*types.ManagedObjectReference{m.DatastoreSystem, m.NetworkSystem, m.VirtualNicManager, m.AdvancedOption, m.FirewallSystem, m.StorageSystem, m.CertificateManager} {
		if part != nil {
			s.vim.Remove(s.simulated(), *part)
		}
	}
	delete(s.inventory.hosts, s.nameOf(ref))
	delete(s.inventory.shown, ref)
	s.forget(ref)
}

func (s *Server) mount(store types.ManagedObjectReference, change func([]types.DatastoreHostMount) []types.DatastoreHostMount) {
	ds := s.vim.Get(store).(*simulator.Datastore)
	var mounts []types.DatastoreHostMount
	s.locked(ds, func() { mounts = slices.Clone(ds.Host) })
	s.update(ds, set("host", change(mounts)))
}

func (s *Server) countVMs(ref types.ManagedObjectReference) (n int) {
	host := s.vim.Get(ref).(*simulator.HostSystem)
	s.locked(host, func() { n = len(host.Vm) })
	return n
}

// describeHost makes a host's properties what h says, and tells whether they
// were others.
func (s *Server) describeHost(ref types.ManagedObjectReference, h Host) (changed bool) {
	host := s.vim.Get(ref).(*simulator.HostSystem)
	var summary types.HostListSummary
	var hardware types.HostHardwareInfo
	var runtime types.HostRuntimeInfo
	s.locked(host, func() { summary, hardware, runtime = host.Summary, *host.Hardware, host.Runtime })
	hw := *summary.Hardware
	if h.CPUs > 0 {
		hw.NumCpuCores, hw.NumCpuThreads = int16(h.CPUs), int16(h.CPUs)
	}
	if h.MHz > 0 {
		hw.CpuMhz = int32(h.MHz)
	}
	if h.Memory > 0 {
		hw.MemorySize = h.Memory
	}
	hw.Vendor, hw.Model, hw.CpuModel = "Atoll", "KVM node", ""
	hardware.MemorySize = hw.MemorySize
	hardware.CpuInfo.NumCpuCores, hardware.CpuInfo.NumCpuThreads = hw.NumCpuCores, hw.NumCpuThreads
	hardware.CpuInfo.Hz = int64(hw.CpuMhz) * 1_000_000
	status := types.ManagedEntityStatusGreen
	runtime.ConnectionState = types.HostSystemConnectionStateConnected
	switch h.State {
	case HostTroubled:
		status = types.ManagedEntityStatusYellow
	case HostNotResponding:
		status, runtime.ConnectionState = types.ManagedEntityStatusRed, types.HostSystemConnectionStateNotResponding
	}
	if reflect.DeepEqual(hw, *summary.Hardware) && status == summary.OverallStatus && runtime.ConnectionState == host.Runtime.ConnectionState {
		return false
	}
	summary.Hardware, summary.OverallStatus = &hw, status
	summary.QuickStats = types.HostListSummaryQuickStats{} // nobody measures it here
	if _, added := s.inventory.shown[ref]; added {
		s.inventory.shown[ref] = Host{Name: h.Name, CPUs: int(hw.NumCpuCores), MHz: int(hw.CpuMhz), Memory: hw.MemorySize, State: h.State}
	}
	s.update(host, set("runtime", runtime), set("hardware", &hardware), set("summary", summary), set("overallStatus", status))
	return true
}

// resize gives a cluster and its pools what its hosts have now.
func (s *Server) resize(c *simulator.ClusterComputeResource) {
	root, ok := s.pool(*c.ResourcePool)
	if !ok {
		return
	}
	s.rootPool(root)
	for _, e := range s.vim.All("ResourcePool") {
		if p, ok := e.(*simulator.ResourcePool); ok && p.Owner == c.Self && s.shares[p.Self] != nil {
			s.refreshRuntime(p)
		}
	}
}

// restoreHost puts back a host that ShowHost added. One that the configuration
// has by now is the configuration's.
func (s *Server) restoreHost(ref types.ManagedObjectReference, parent string, h Host) error {
	if _, known := s.inventory.hosts[h.Name]; known {
		return s.store.put(map[string]any{keyOf(ref): nil})
	}
	c, ok := s.vim.Get(types.ManagedObjectReference{Type: "ClusterComputeResource", Value: parent}).(*simulator.ClusterComputeResource)
	if !ok {
		s.log.Warn("a host is not put back: its cluster is gone", "host", h.Name)
		return nil
	}
	s.putHost(ref, c, h)
	s.resize(c)
	return nil
}

// simulated is the context of what the server itself does.
func (s *Server) simulated() *simulator.Context {
	return &simulator.Context{Context: context.Background(), Map: s.vim}
}

// hostEvent posts what became of a host; no user did it.
func (s *Server) hostEvent(e types.BaseHostEvent, ref types.ManagedObjectReference, sentence string) {
	x := e.GetHostEvent()
	x.FullFormattedMessage = sentence
	x.Host = &types.HostEventArgument{EntityEventArgument: types.EntityEventArgument{Name: s.nameOf(ref)}, Host: ref}
	cluster := s.parent(ref)
	x.ComputeResource = &types.ComputeResourceEventArgument{EntityEventArgument: types.EntityEventArgument{Name: s.nameOf(cluster)}, ComputeResource: cluster}
	s.frame(&x.Event, ref)
	ctx := s.simulated()
	ctx.Session = &simulator.Session{}
	em := s.vim.EventManager()
	ctx.WithLock(em, func() { em.PostEvent(ctx, &types.PostEvent{EventToPost: e.(types.BaseEvent)}) })
}
