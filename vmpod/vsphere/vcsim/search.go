package vcsim

import (
	"slices"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// The simulator's SearchIndex reads objects without their locks and ignores
// permissions.

// visible returns the refs that the caller may know of.
func (c *call) visible(refs []types.ManagedObjectReference) []types.ManagedObjectReference {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	return slices.DeleteFunc(refs, func(ref types.ManagedObjectReference) bool {
		view, _ := c.s.sees(c.who, ref)
		return !view
	})
}

func first(refs []types.ManagedObjectReference) *types.ManagedObjectReference {
	if len(refs) == 0 {
		return nil
	}
	return &refs[0]
}

// find returns the VMs, or the hosts, that match.
func (c *call) find(vms bool, vm func(mo.VirtualMachine) bool, host func(mo.HostSystem) bool) (refs []types.ManagedObjectReference) {
	kind := "HostSystem"
	if vms {
		kind = "VirtualMachine"
	}
	for _, e := range c.s.vim.All(kind) {
		c.s.locked(e, func() {
			switch o := e.(type) {
			case *simulator.VirtualMachine:
				if vm(o.VirtualMachine) {
					refs = append(refs, o.Self)
				}
			case *simulator.HostSystem:
				if host(o.HostSystem) {
					refs = append(refs, o.Self)
				}
			}
		})
	}
	slices.SortFunc(refs, compareRefs)
	return c.visible(refs)
}

func (c *call) withUUID(id string, vms bool, instance *bool) []types.ManagedObjectReference {
	return c.find(vms, func(vm mo.VirtualMachine) bool {
		if vm.Config == nil {
			return false
		}
		if instance != nil && *instance {
			return strings.EqualFold(vm.Config.InstanceUuid, id)
		}
		return strings.EqualFold(vm.Config.Uuid, id)
	}, func(h mo.HostSystem) bool {
		return h.Summary.Hardware != nil && strings.EqualFold(h.Summary.Hardware.Uuid, id)
	})
}

func (c *call) findByUUID() soap.HasFault {
	r := c.body.(*types.FindByUuid)
	return &methods.FindByUuidBody{Res: &types.FindByUuidResponse{Returnval: first(c.withUUID(r.Uuid, r.VmSearch, r.InstanceUuid))}}
}

func (c *call) findAllByUUID() soap.HasFault {
	r := c.body.(*types.FindAllByUuid)
	return &methods.FindAllByUuidBody{Res: &types.FindAllByUuidResponse{Returnval: c.withUUID(r.Uuid, r.VmSearch, r.InstanceUuid)}}
}

func (c *call) withIP(ip string, vms bool) []types.ManagedObjectReference {
	return c.find(vms, func(vm mo.VirtualMachine) bool { return vm.Guest != nil && vm.Guest.IpAddress == ip }, func(mo.HostSystem) bool { return false })
}

func (c *call) findByIP() soap.HasFault {
	r := c.body.(*types.FindByIp)
	return &methods.FindByIpBody{Res: &types.FindByIpResponse{Returnval: first(c.withIP(r.Ip, r.VmSearch))}}
}

func (c *call) findAllByIP() soap.HasFault {
	r := c.body.(*types.FindAllByIp)
	return &methods.FindAllByIpBody{Res: &types.FindAllByIpResponse{Returnval: c.withIP(r.Ip, r.VmSearch)}}
}

// child returns the child of that name.
func (s *Server) child(of types.ManagedObjectReference, name string) *types.ManagedObjectReference {
	var refs []types.ManagedObjectReference
	o := s.vim.Get(of)
	if o == nil {
		return nil
	}
	s.locked(o, func() {
		switch e := o.(type) {
		case *simulator.Datacenter:
			refs = []types.ManagedObjectReference{e.VmFolder, e.HostFolder, e.DatastoreFolder, e.NetworkFolder}
		case *simulator.Folder:
			refs = slices.Clone(e.ChildEntity)
		case *simulator.ClusterComputeResource:
			refs = append(slices.Clone(e.Host), *e.ResourcePool)
		case *simulator.ResourcePool:
			refs = append(slices.Clone(e.ResourcePool.ResourcePool), e.Vm...)
		}
	})
	for _, ref := range refs {
		if s.nameOf(ref) == name {
			return &ref
		}
	}
	return nil
}

func (c *call) findChild() soap.HasFault {
	r := c.body.(*types.FindChild)
	if fault := c.s.reachable(c.ctx, r.Entity); fault != nil {
		return refuse(fault)
	}
	res := &types.FindChildResponse{}
	if ref := c.s.child(r.Entity, r.Name); ref != nil {
		res.Returnval = first(c.visible([]types.ManagedObjectReference{*ref}))
	}
	return &methods.FindChildBody{Res: res}
}

func (c *call) findByPath() soap.HasFault {
	at := &c.s.root
	for _, name := range strings.FieldsFunc(c.body.(*types.FindByInventoryPath).InventoryPath, func(r rune) bool { return r == '/' }) {
		if at = c.s.child(*at, name); at == nil {
			break
		}
	}
	res := &types.FindByInventoryPathResponse{}
	if at != nil {
		res.Returnval = first(c.visible([]types.ManagedObjectReference{*at}))
	}
	return &methods.FindByInventoryPathBody{Res: res}
}
