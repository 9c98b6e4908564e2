package vcsim

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// A Mirror is a pod VM of a KVM node, as the inventory shows it.
type Mirror struct {
	// UUID is the VM's instance UUID, in lower case; it identifies the mirror.
	UUID string
	// Name is the VM's, unique in its folder.
	Name string
	// CPUs and MemoryMiB are the VM's size.
	CPUs      int32
	MemoryMiB int64
	// On is its power state.
	On bool
	// Addresses are the pod's, the one that counts first.
	Addresses []string
	// HostName is the guest's own name, MAC that of its interface, DiskUUID
	// that of its writable disk; each may be empty.
	HostName, MAC, DiskUUID string
	// Host is the node's name, one of Config.Clusters or of ShowHost.
	Host string
	// Pool and Folder are managed object ids ("resgroup-42", "group-v42");
	// empty: the host's cluster's root pool, the datacenter's VM folder.
	Pool, Folder string
	// Annotations become the VM's extra configuration (keys as they are), and
	// Note its annotation.
	Annotations map[string]string
	Note        string
}

// A PowerOp is what a user asked of a mirror.
type PowerOp string

// Operations that are passed on to Config.Power.
const (
	PowerOn       PowerOp = "PowerOnVM"
	PowerOff      PowerOp = "PowerOffVM"
	PowerReset    PowerOp = "ResetVM"
	PowerSuspend  PowerOp = "SuspendVM"
	GuestShutdown PowerOp = "ShutdownGuest"
	GuestReboot   PowerOp = "RebootGuest"
	GuestStandby  PowerOp = "StandbyGuest"
	Destroy       PowerOp = "Destroy"
)

// A PowerRequest is one such operation on one mirror.
type PowerRequest struct {
	Op   PowerOp
	UUID string
	// User asks, as "alice@vsphere.local"; permissions let him.
	User string
}

const mirrorIsPods = "this virtual machine is a pod's; only the pod says where and what it is"

// a place is where a mirror is, for what looks up its parents.
type place struct{ folder, pool, host types.ManagedObjectReference }

type mirrors struct {
	mu     sync.RWMutex
	places map[types.ManagedObjectReference]place
	byUUID map[string]types.ManagedObjectReference
	specs  map[types.ManagedObjectReference]Mirror
}

func (s *Server) mirrorOf(ref types.ManagedObjectReference) (place, bool) {
	if ref.Type != "VirtualMachine" {
		return place{}, false
	}
	s.mirrors.mu.RLock()
	defer s.mirrors.mu.RUnlock()
	p, ok := s.mirrors.places[ref]
	return p, ok
}

var uuidForm = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// Mirror has the inventory show a pod's VM as m says, and returns its managed
// object id. It is idempotent on UUID. A pool or folder that is not there, and
// an unknown host, are ErrFailedPrecondition; a name that another object in the
// folder has is ErrAlreadyExists.
func (s *Server) Mirror(_ context.Context, m Mirror) (string, error) {
	if !uuidForm.MatchString(m.UUID) {
		return "", fmt.Errorf("vcsim: mirror %q: UUID %q is not one in lower case: %w", m.Name, m.UUID, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	at, err := s.placeOf(m)
	if err != nil {
		return "", err
	}
	s.mirrors.mu.RLock()
	ref, known := s.mirrors.byUUID[m.UUID]
	was := s.mirrors.places[ref]
	s.mirrors.mu.RUnlock()
	name, fault := s.freeName(m.Name, at.folder, ref)
	if fault != nil {
		return "", fmt.Errorf("vcsim: mirror %q: %s: %w", m.Name, messageOf(fault), errdefs.ErrAlreadyExists)
	}
	m.Name = name
	if !known {
		ref = s.newMirror(m, at)
	} else if s.place(ref, m, at) != was {
		s.unlist(ref, was)
		s.list(ref, at)
	}
	s.show(ref, m, at)
	if err := s.save(ref); err != nil {
		return "", err
	}
	return ref.Value, nil
}

// placeOf finds what a mirror names.
func (s *Server) placeOf(m Mirror) (at place, err error) {
	missing := func(what, id string) error {
		return fmt.Errorf("vcsim: mirror %q: there is no %s %q: %w", m.Name, what, id, errdefs.ErrFailedPrecondition)
	}
	host, ok := s.inventory.hosts[m.Host]
	if !ok {
		return at, missing("host", m.Host)
	}
	at = place{folder: s.inventory.dc.VmFolder, host: host}
	cluster, _ := s.vim.Get(s.parent(host)).(*simulator.ClusterComputeResource)
	at.pool = *cluster.ResourcePool
	if m.Pool != "" {
		at.pool = types.ManagedObjectReference{Type: "ResourcePool", Value: m.Pool}
	}
	if m.Folder != "" {
		at.folder = types.ManagedObjectReference{Type: "Folder", Value: m.Folder}
	}
	if p, ok := s.pool(at.pool); !ok {
		return at, missing("resource pool", m.Pool)
	} else if p.Owner != cluster.Self {
		return at, missing("resource pool in the cluster of host "+m.Host, m.Pool)
	}
	if f, ok := s.vim.Get(at.folder).(*simulator.Folder); !ok || !slices.Contains(f.ChildType, "VirtualMachine") {
		return at, missing("VM folder", m.Folder)
	}
	return at, nil
}

func (s *Server) place(ref types.ManagedObjectReference, m Mirror, at place) place {
	s.mirrors.mu.Lock()
	defer s.mirrors.mu.Unlock()
	s.mirrors.places[ref], s.mirrors.specs[ref], s.mirrors.byUUID[m.UUID] = at, m, ref
	return at
}

func (s *Server) newMirror(m Mirror, at place) types.ManagedObjectReference {
	return s.putMirror(types.ManagedObjectReference{Type: "VirtualMachine"}, m, at)
}

// putMirror puts a VM into the inventory; ref may hold the id it had before.
func (s *Server) putMirror(ref types.ManagedObjectReference, m Mirror, at place) types.ManagedObjectReference {
	vm := &simulator.VirtualMachine{}
	vm.Self, vm.Name = ref, m.Name
	if ref.Value == "" { // known before anyone can see it
		s.vim.NewEntity(vm)
	}
	vm.Parent, vm.ResourcePool = &at.folder, &at.pool
	vm.Config = &types.VirtualMachineConfigInfo{Name: m.Name, InstanceUuid: m.UUID, Uuid: m.UUID, CreateDate: types.NewTime(time.Now())}
	vm.Runtime.Host, vm.Summary.Runtime.Host = &at.host, &at.host
	vm.Guest = &types.GuestInfo{}
	vm.AvailableField = s.availableFields("VirtualMachine")
	s.place(vm.Self, m, at)
	s.vim.Put(vm)
	s.list(vm.Self, at)
	return vm.Self
}

// list makes a VM a child of its place.
func (s *Server) list(ref types.ManagedObjectReference, at place) {
	s.relist(at, func(refs []types.ManagedObjectReference) []types.ManagedObjectReference {
		return append(without(refs, ref), ref)
	})
	s.update(s.vim.Get(ref), set("parent", &at.folder), set("resourcePool", &at.pool))
}

func (s *Server) unlist(ref types.ManagedObjectReference, at place) {
	s.relist(at, func(refs []types.ManagedObjectReference) []types.ManagedObjectReference { return without(refs, ref) })
}

func (s *Server) relist(at place, change func([]types.ManagedObjectReference) []types.ManagedObjectReference) {
	if f, ok := s.vim.Get(at.folder).(*simulator.Folder); ok {
		s.update(f, set("childEntity", change(s.children(f))))
	}
	if p, ok := s.pool(at.pool); ok {
		s.update(p, set("vm", change(s.poolState(p).Vm)))
	}
	if h, ok := s.vim.Get(at.host).(*simulator.HostSystem); ok {
		var vms []types.ManagedObjectReference
		s.locked(h, func() { vms = slices.Clone(h.Vm) })
		s.update(h, set("vm", change(vms)))
	}
}

// rehome follows a pool that took over the VMs of one that went.
func (s *Server) rehome(ref, pool types.ManagedObjectReference) {
	s.mirrors.mu.Lock()
	at, m := s.mirrors.places[ref], s.mirrors.specs[ref]
	at.pool, m.Pool = pool, pool.Value
	s.mirrors.places[ref], s.mirrors.specs[ref] = at, m
	s.mirrors.mu.Unlock()
	s.update(s.vim.Get(ref), set("resourcePool", &pool))
}

// show makes the VM's properties what m says.
func (s *Server) show(ref types.ManagedObjectReference, m Mirror, at place) {
	vm := s.vim.Get(ref).(*simulator.VirtualMachine)
	var have mo.VirtualMachine
	s.locked(vm, func() { have = vm.VirtualMachine })
	config := *have.Config
	config.Name, config.Annotation = m.Name, m.Note
	config.GuestId, config.GuestFullName = "other6xLinux64Guest", "Atoll pod VM (Linux)"
	config.Version, config.Firmware = "vmx-21", "bios"
	config.ManagedBy = &types.ManagedByInfo{ExtensionKey: "dev.atoll", Type: "pod"}
	config.Hardware.NumCPU, config.Hardware.NumCoresPerSocket, config.Hardware.MemoryMB = m.CPUs, types.NewInt32(1), int32(m.MemoryMiB)
	config.Hardware.Device = append(devices(m), s.diskDevices(ref)...)
	config.ExtraConfig = nil
	for _, key := range sortedKeys(m.Annotations) {
		config.ExtraConfig = append(config.ExtraConfig, &types.OptionValue{Key: key, Value: m.Annotations[key]})
	}
	runtime := types.VirtualMachineRuntimeInfo{
		Host: &at.host, ConnectionState: types.VirtualMachineConnectionStateConnected, PowerState: types.VirtualMachinePowerStatePoweredOff,
		BootTime: have.Runtime.BootTime, MaxMemoryUsage: int32(m.MemoryMiB),
	}
	guest := types.GuestInfo{HostName: m.HostName, GuestState: "notRunning", ToolsRunningStatus: "guestToolsNotRunning", ToolsStatus: types.VirtualMachineToolsStatusToolsNotInstalled, GuestFullName: config.GuestFullName}
	if m.On {
		runtime.PowerState, guest.GuestState = types.VirtualMachinePowerStatePoweredOn, "running"
		if runtime.BootTime == nil {
			runtime.BootTime = types.NewTime(time.Now())
		}
	} else {
		runtime.BootTime = nil
	}
	summary := types.VirtualMachineSummary{
		Vm: &ref, Runtime: runtime, OverallStatus: types.ManagedEntityStatusGreen,
		Config: types.VirtualMachineConfigSummary{Name: m.Name, InstanceUuid: m.UUID, Uuid: m.UUID, NumCpu: m.CPUs, MemorySizeMB: int32(m.MemoryMiB), Annotation: m.Note, GuestId: config.GuestId, GuestFullName: config.GuestFullName, ManagedBy: config.ManagedBy},
	}
	if len(m.Addresses) > 0 {
		guest.IpAddress = m.Addresses[0]
		guest.Net = []types.GuestNicInfo{{MacAddress: m.MAC, IpAddress: m.Addresses, Connected: m.On}}
	}
	summary.Guest = &types.VirtualMachineGuestSummary{GuestId: config.GuestId, HostName: m.HostName, IpAddress: guest.IpAddress, ToolsRunningStatus: guest.ToolsRunningStatus}
	s.place(ref, m, at)
	s.names.rename(ref, have.Name, m.Name)
	s.update(vm, set("name", m.Name), set("config", &config), set("runtime", runtime), set("guest", &guest), set("summary", summary))
}

func devices(m Mirror) (all []types.BaseVirtualDevice) {
	if m.MAC != "" {
		all = append(all, &types.VirtualVmxnet3{VirtualVmxnet: types.VirtualVmxnet{VirtualEthernetCard: types.VirtualEthernetCard{
			VirtualDevice: types.VirtualDevice{Key: 4000, DeviceInfo: &types.Description{Label: "Network adapter 1", Summary: "pod network"}}, MacAddress: m.MAC, AddressType: "manual",
		}}})
	}
	if m.DiskUUID != "" {
		all = append(all, &types.VirtualDisk{VirtualDevice: types.VirtualDevice{Key: 2000, DeviceInfo: &types.Description{Label: "Hard disk 1", Summary: "ephemeral disk"}, Backing: &types.VirtualDiskFlatVer2BackingInfo{Uuid: m.DiskUUID}}})
	}
	return all
}

// Unmirror takes a mirror away; one that is not there is taken away already.
func (s *Server) Unmirror(_ context.Context, uuid string) error {
	uuid = strings.ToLower(uuid)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mirrors.mu.RLock()
	ref, known := s.mirrors.byUUID[uuid]
	at := s.mirrors.places[ref]
	s.mirrors.mu.RUnlock()
	if !known {
		return nil
	}
	s.releaseDisks(ref)
	s.unlist(ref, at)
	s.forget(ref)
	s.mirrors.mu.Lock()
	delete(s.mirrors.byUUID, uuid)
	delete(s.mirrors.places, ref)
	delete(s.mirrors.specs, ref)
	s.mirrors.mu.Unlock()
	return s.save(ref)
}

// Mirrors returns the UUIDs of all, in order.
func (s *Server) Mirrors() []string {
	s.mirrors.mu.RLock()
	defer s.mirrors.mu.RUnlock()
	return sortedKeys(s.mirrors.byUUID)
}

// InstanceUUID is the vCenter's own.
func (s *Server) InstanceUUID() string { return s.instanceUUID }

// power passes an operation on a mirror to the configured function.
func power(op PowerOp) func(*call) soap.HasFault {
	return func(c *call) soap.HasFault {
		c.s.mirrors.mu.RLock()
		m, ok := c.s.mirrors.specs[c.this]
		c.s.mirrors.mu.RUnlock()
		var fault types.BaseMethodFault
		switch {
		case !ok:
			fault = &types.NotSupported{RuntimeFault: reason("the embedded vCenter runs no virtual machine but pods'")}
		case c.s.config.Power == nil:
			fault = &types.NotSupported{RuntimeFault: reason(mirrorIsPods)}
		default:
			if err := c.s.config.Power(c.request.Context(), PowerRequest{Op: op, UUID: m.UUID, User: c.who.Name}); err != nil {
				fault = &types.NotSupported{RuntimeFault: reason(err.Error())}
			}
		}
		switch {
		case strings.HasSuffix(c.name, "_Task"):
			return c.task(nil, fault, false)
		case fault != nil:
			return refuse(fault)
		case op == GuestShutdown:
			return &methods.ShutdownGuestBody{Res: &types.ShutdownGuestResponse{}}
		case op == GuestReboot:
			return &methods.RebootGuestBody{Res: &types.RebootGuestResponse{}}
		}
		return &methods.StandbyGuestBody{Res: &types.StandbyGuestResponse{}}
	}
}

// refuseVM is for what cannot be done to pods' VMs.
func (c *call) refuseVM() soap.HasFault {
	if c.name == "CreateVM_Task" {
		return refuse(&types.NotSupported{RuntimeFault: reason("the embedded vCenter makes no virtual machines; run a pod")})
	}
	return refuse(&types.NotSupported{RuntimeFault: reason(mirrorIsPods)})
}
