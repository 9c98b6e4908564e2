package vcsim

import (
	"net/url"
	"slices"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// vSphere's escapes: Managed Object Browser, ManagedEntity.name.
var escapes = strings.NewReplacer("%", "%25", "/", "%2f", `\`, "%5c")

// freeName returns a name as vSphere keeps it, or the fault if a child of the
// parent's has it, other than self (which may be none). Call it with s.mu held.
func (s *Server) freeName(name string, parent, self types.ManagedObjectReference) (string, types.BaseMethodFault) {
	name = escapes.Replace(unescape(name))
	if name == "" || len(name) > 80*3 {
		return "", &types.InvalidName{VimFault: vimReason("a name has 1 to 80 characters"), Name: name}
	}
	if ref, taken := s.names.child(s, parent, self, name); taken {
		return "", &types.DuplicateName{VimFault: vimReason("the name " + name + " is taken here"), Name: name, Object: ref}
	}
	return name, nil
}

// unescape takes vSphere's escapes out again, if the client put them in.
func unescape(name string) string {
	if plain, err := url.PathUnescape(name); err == nil && (strings.Contains(name, "%2") || strings.Contains(name, "%5")) {
		return plain
	}
	return name
}

func (s *Server) children(f *simulator.Folder) (refs []types.ManagedObjectReference) {
	s.locked(f, func() { refs = slices.Clone(f.ChildEntity) })
	return refs
}

func (c *call) createFolder() soap.HasFault {
	r := c.body.(*types.CreateFolder)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	parent, ok := c.s.vim.Get(c.this).(*simulator.Folder)
	if !ok || !slices.Contains(parent.ChildType, "Folder") {
		return refuse(&types.NotSupported{})
	}
	name, fault := c.s.freeName(r.Name, parent.Self, types.ManagedObjectReference{})
	if fault != nil {
		return refuse(fault)
	}
	f := c.s.putFolder(parent, types.ManagedObjectReference{Type: "Folder"}, name)
	if err := c.s.save(f.Self); err != nil {
		return c.broken(err)
	}
	return &methods.CreateFolderBody{Res: &types.CreateFolderResponse{Returnval: f.Self}}
}

func (s *Server) putFolder(parent *simulator.Folder, self types.ManagedObjectReference, name string) *simulator.Folder {
	f := &simulator.Folder{}
	f.Self, f.Name, f.ChildType = self, name, parent.ChildType
	f.AvailableField = s.availableFields("Folder")
	s.vim.PutEntity(parent, f)
	s.names.rename(f.Self, "", name)
	s.adopt(parent, "childEntity", &parent.ChildEntity, f.Self)
	return f
}

func moveFolderNeeds(c *call) []demand {
	r := c.body.(*types.MoveIntoFolder_Task)
	var demands []demand
	for _, ref := range r.List {
		if ref.Type == "VirtualMachine" {
			demands = append(demands, demand{"VirtualMachine.Inventory.Move", ref})
			continue
		}
		demands = append(demands, demand{"Folder.Move", ref}, demand{"Folder.Move", c.s.parent(ref)}, demand{"Folder.Move", c.this})
	}
	return demands
}

func (c *call) moveIntoFolder() soap.HasFault {
	r := c.body.(*types.MoveIntoFolder_Task)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	to, ok := c.s.vim.Get(c.this).(*simulator.Folder)
	if !ok {
		return refuse(&types.NotSupported{})
	}
	for _, ref := range r.List {
		if fault := c.s.moveFolder(ref, to); fault != nil {
			return c.task(nil, fault, false)
		}
	}
	return c.task(nil, nil, false)
}

func (s *Server) moveFolder(ref types.ManagedObjectReference, to *simulator.Folder) types.BaseMethodFault {
	if _, mirror := s.mirrorOf(ref); mirror {
		return &types.NotSupported{RuntimeFault: reason(mirrorIsPods)}
	}
	f, ok := s.vim.Get(ref).(*simulator.Folder)
	from, plain := s.vim.Get(s.parent(ref)).(*simulator.Folder)
	if !ok || !plain || !slices.Equal(f.ChildType, to.ChildType) {
		return &types.NotSupported{RuntimeFault: reason("folders move among folders of their own kind")}
	}
	for up := to.Self; up.Value != ""; up = s.parent(up) {
		if up == ref {
			return &types.InvalidFolder{VimFault: vimReason("a folder cannot be moved below itself"), Target: to.Self}
		}
	}
	if from.Self == to.Self {
		return nil
	}
	if _, fault := s.freeName(s.nameOf(ref), to.Self, ref); fault != nil {
		return fault
	}
	s.update(from, set("childEntity", without(s.children(from), ref)))
	s.update(f, set("parent", &to.Self))
	s.update(to, set("childEntity", append(s.children(to), ref)))
	if err := s.save(ref); err != nil {
		return brokenFault(err)
	}
	return nil
}

func renameNeeds(c *call) []demand {
	switch c.this.Type {
	case "Folder":
		return []demand{{"Folder.Rename", c.this}}
	case "ResourcePool":
		return []demand{{"Resource.RenamePool", c.this}}
	case "VirtualMachine":
		return []demand{{"VirtualMachine.Config.Rename", c.this}}
	}
	return []demand{{"Global.Settings", c.this}}
}

// rename is ManagedEntity's.
func (c *call) rename() soap.HasFault {
	r := c.body.(*types.Rename_Task)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if c.s.fixed(c.this) || c.this.Type == "HostSystem" {
		return c.task(nil, &types.NotSupported{RuntimeFault: reason("this object's name follows from the configuration of the embedded vCenter")}, false)
	}
	if _, mirror := c.s.mirrorOf(c.this); mirror {
		return c.task(nil, &types.NotSupported{RuntimeFault: reason(mirrorIsPods)}, false)
	}
	was := c.s.nameOf(c.this)
	name, fault := c.s.freeName(r.NewName, c.s.parent(c.this), c.this)
	if fault != nil {
		return c.task(nil, fault, false)
	}
	changes := []types.PropertyChange{set("name", name)}
	if p, ok := c.s.pool(c.this); ok {
		at := c.s.poolItself(p)
		changes = append(changes, set("summary", poolSummary(name, at.Config, at.Runtime)))
	}
	c.s.update(c.s.vim.Get(c.this), changes...)
	c.s.names.rename(c.this, was, name)
	if err := c.s.save(c.this); err != nil {
		return c.broken(err)
	}
	return c.task(nil, nil, false)
}

func destroyNeeds(c *call) []demand {
	parent := c.s.parent(c.this)
	both := func(privilege string) []demand { return []demand{{privilege, c.this}, {privilege, parent}} }
	switch c.this.Type {
	case "Folder":
		return both("Folder.Delete")
	case "ResourcePool":
		return both("Resource.DeletePool")
	case "VirtualMachine":
		return []demand{{"VirtualMachine.Inventory.Delete", c.this}}
	}
	return []demand{{"Global.Settings", c.this}}
}

// destroy is ManagedEntity's.
func (c *call) destroy() soap.HasFault {
	if _, mirror := c.s.mirrorOf(c.this); mirror {
		return power(Destroy)(c)
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	var fault types.BaseMethodFault
	switch o := c.s.vim.Get(c.this).(type) {
	case *simulator.ResourcePool:
		fault = c.s.destroyPool(c, o)
	case *simulator.Folder:
		fault = c.s.destroyFolder(o)
	default:
		fault = &types.NotSupported{RuntimeFault: reason("this object follows from the configuration of the embedded vCenter")}
	}
	return c.task(nil, fault, false)
}

// destroyFolder takes what is in it with it, as vSphere does it; pods' VMs
// stop it before anything is done.
func (s *Server) destroyFolder(f *simulator.Folder) types.BaseMethodFault {
	parent, ok := s.vim.Get(s.parent(f.Self)).(*simulator.Folder)
	if !ok || s.fixed(f.Self) {
		return &types.NotSupported{RuntimeFault: reason("this folder goes with its datacenter")}
	}
	all, fault := s.below(f, nil)
	if fault != nil {
		return fault
	}
	s.update(parent, set("childEntity", without(s.children(parent), f.Self)))
	for _, ref := range all {
		s.forget(ref)
	}
	if err := s.save(all...); err != nil {
		return brokenFault(err)
	}
	return nil
}

// below are a folder's folders, the deepest first, and itself.
func (s *Server) below(f *simulator.Folder, all []types.ManagedObjectReference) ([]types.ManagedObjectReference, types.BaseMethodFault) {
	for _, ref := range s.children(f) {
		child, ok := s.vim.Get(ref).(*simulator.Folder)
		if !ok {
			return nil, &types.ResourceInUse{VimFault: vimReason("it holds " + s.nameOf(ref) + ", which is a pod's or part of the configuration"), Type: ref.Type, Name: s.nameOf(ref)}
		}
		var fault types.BaseMethodFault
		if all, fault = s.below(child, all); fault != nil {
			return nil, fault
		}
	}
	return append(all, f.Self), nil
}

// forget removes an object that users made, with its permissions and tags.
func (s *Server) forget(ref types.ManagedObjectReference) {
	delete(s.access.permissions, ref)
	s.names.rename(ref, s.nameOf(ref), "")
	s.tags.forget(ref)
	s.vim.Remove(s.svc.Context, ref)
}
