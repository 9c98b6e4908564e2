package vcsim

import (
	"slices"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// Custom attributes. The simulator's own change objects without telling those
// who watch, and forget the object type.

// firstField is the key of the first custom attribute, as in a vCenter.
const firstField = 101

// maxValue is how long a custom attribute's value may be.
const maxValue = 8 << 10

func (s *Server) field(match func(types.CustomFieldDef) bool) (types.CustomFieldDef, bool) {
	i := slices.IndexFunc(s.fields, match)
	if i < 0 {
		return types.CustomFieldDef{}, false
	}
	return s.fields[i], true
}

func fieldFor(d types.CustomFieldDef, kind string) bool {
	return d.ManagedObjectType == "" || d.ManagedObjectType == kind
}

// availableFields are those that an object of a type may have.
func (s *Server) availableFields(kind string) (defs []types.CustomFieldDef) {
	for _, d := range s.fields {
		if fieldFor(d, kind) {
			defs = append(defs, d)
		}
	}
	return defs
}

func (c *call) addField() soap.HasFault {
	r := c.body.(*types.AddCustomFieldDef)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if r.Name == "" || len(r.Name) > 80 {
		return refuse(&types.InvalidArgument{RuntimeFault: reason("a custom attribute's name has 1 to 80 characters"), InvalidProperty: "name"})
	}
	if _, taken := c.s.field(func(d types.CustomFieldDef) bool {
		return d.Name == r.Name && (r.MoType == "" || fieldFor(d, r.MoType))
	}); taken {
		return refuse(&types.DuplicateName{VimFault: vimReason("there is a custom attribute of that name"), Name: r.Name, Object: c.this})
	}
	c.s.lastField = max(firstField-1, c.s.lastField) + 1
	d := types.CustomFieldDef{
		Key: c.s.lastField, Name: r.Name, Type: "string", ManagedObjectType: r.MoType,
		FieldDefPrivileges: r.FieldDefPolicy, FieldInstancePrivileges: r.FieldPolicy,
	}
	c.s.fields = append(c.s.fields, d)
	if err := c.s.fieldsChanged(d.Key); err != nil {
		return c.broken(err)
	}
	return &methods.AddCustomFieldDefBody{Res: &types.AddCustomFieldDefResponse{Returnval: d}}
}

func (c *call) renameField() soap.HasFault {
	r := c.body.(*types.RenameCustomFieldDef)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	i := slices.IndexFunc(c.s.fields, func(d types.CustomFieldDef) bool { return d.Key == r.Key })
	if i < 0 {
		return refuse(&types.NotFound{})
	}
	if _, taken := c.s.field(func(d types.CustomFieldDef) bool { return d.Name == r.Name && d.Key != r.Key }); taken {
		return refuse(&types.DuplicateName{VimFault: vimReason("there is a custom attribute of that name"), Name: r.Name, Object: c.this})
	}
	c.s.fields[i].Name = r.Name
	if err := c.s.fieldsChanged(r.Key); err != nil {
		return c.broken(err)
	}
	return &methods.RenameCustomFieldDefBody{Res: &types.RenameCustomFieldDefResponse{}}
}

func (c *call) removeField() soap.HasFault {
	r := c.body.(*types.RemoveCustomFieldDef)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if _, there := c.s.field(func(d types.CustomFieldDef) bool { return d.Key == r.Key }); !there {
		return refuse(&types.NotFound{})
	}
	c.s.fields = slices.DeleteFunc(slices.Clone(c.s.fields), func(d types.CustomFieldDef) bool { return d.Key == r.Key })
	for _, e := range c.s.vim.All("") {
		if values := c.s.values(e); hasKey(values, r.Key) {
			c.s.setValues(e, slices.DeleteFunc(values, func(v types.BaseCustomFieldValue) bool { return v.GetCustomFieldValue().Key == r.Key }))
			if err := c.s.save(e.Reference()); err != nil {
				return c.broken(err)
			}
		}
	}
	if err := c.s.fieldsChanged(r.Key); err != nil {
		return c.broken(err)
	}
	return &methods.RemoveCustomFieldDefBody{Res: &types.RemoveCustomFieldDefResponse{}}
}

// fieldsChanged shows the definitions and keeps the one that changed.
func (s *Server) fieldsChanged(key int32) error {
	s.update(s.vim.Get(s.customFieldsManager), set("field", slices.Clone(s.fields)))
	for _, e := range s.vim.All("") {
		defs := s.availableFields(e.Reference().Type)
		s.locked(e, func() { e.Entity().AvailableField = defs })
	}
	return s.saveField(key)
}

func hasKey(values []types.BaseCustomFieldValue, key int32) bool {
	return slices.ContainsFunc(values, func(v types.BaseCustomFieldValue) bool { return v.GetCustomFieldValue().Key == key })
}

func (s *Server) values(e mo.Entity) (values []types.BaseCustomFieldValue) {
	s.locked(e, func() { values = slices.Clone(e.Entity().CustomValue) })
	return values
}

func (s *Server) setValues(e mo.Entity, values []types.BaseCustomFieldValue) {
	s.update(e, set("customValue", values), set("value", values))
}

func (c *call) setField() soap.HasFault {
	r := c.body.(*types.SetField)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if fault := c.s.setValue(r.Entity, r.Key, r.Value); fault != nil {
		return refuse(fault)
	}
	return &methods.SetFieldBody{Res: &types.SetFieldResponse{}}
}

func (c *call) setCustomValue() soap.HasFault {
	r := c.body.(*types.SetCustomValue)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	d, ok := c.s.field(func(d types.CustomFieldDef) bool { return d.Name == r.Key && fieldFor(d, c.this.Type) })
	if !ok {
		return refuse(&types.InvalidArgument{RuntimeFault: reason("there is no custom attribute " + r.Key), InvalidProperty: "key"})
	}
	if fault := c.s.setValue(c.this, d.Key, r.Value); fault != nil {
		return refuse(fault)
	}
	return &methods.SetCustomValueBody{Res: &types.SetCustomValueResponse{}}
}

// setValue sets a custom attribute of an object; an empty value unsets it.
func (s *Server) setValue(ref types.ManagedObjectReference, key int32, value string) types.BaseMethodFault {
	e, ok := s.vim.Get(ref).(mo.Entity)
	if !ok {
		return &types.ManagedObjectNotFound{Obj: ref}
	}
	d, ok := s.field(func(d types.CustomFieldDef) bool { return d.Key == key })
	if !ok || !fieldFor(d, ref.Type) {
		return &types.InvalidArgument{RuntimeFault: reason("there is no such custom attribute for this kind of object"), InvalidProperty: "key"}
	}
	if len(value) > maxValue {
		return &types.InvalidArgument{RuntimeFault: reason("the value is too long"), InvalidProperty: "value"}
	}
	values := slices.DeleteFunc(s.values(e), func(v types.BaseCustomFieldValue) bool { return v.GetCustomFieldValue().Key == key })
	if value != "" {
		values = append(values, &types.CustomFieldStringValue{CustomFieldValue: types.CustomFieldValue{Key: key}, Value: value})
	}
	s.setValues(e, values)
	if err := s.save(ref); err != nil {
		return brokenFault(err)
	}
	return nil
}
