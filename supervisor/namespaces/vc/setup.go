package vc

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/internal/vsphere"
)

// attributePrefix is that of Atoll's own custom attributes.
const attributePrefix = "atoll."

// setup reads, after each login, how this vCenter numbers custom attributes and
// roles, and defines the attribute without which nothing can be marked.
func (c *Client) setup(ctx context.Context) error {
	content := c.session.Client().ServiceContent
	if content.CustomFieldsManager == nil || content.AuthorizationManager == nil {
		return fmt.Errorf("vCenter %s has no custom attributes or no permissions: %w", c.session.Address(), errdefs.ErrInvalidArgument)
	}
	found, err := c.session.Retrieve(ctx, map[ref][]string{
		*content.CustomFieldsManager:  {"field"},
		*content.AuthorizationManager: {"roleList"},
	})
	if err != nil {
		return vsphere.Error("read custom attributes and roles of vCenter "+c.session.Address(), err)
	}
	defs, _ := found[*content.CustomFieldsManager]["field"].(types.ArrayOfCustomFieldDef)
	c.fields.set(defs.CustomFieldDef)
	list, _ := found[*content.AuthorizationManager]["roleList"].(types.ArrayOfAuthorizationRole)
	c.roles.set(list.AuthorizationRole)
	key, err := c.field(ctx, AttributeOwner)
	if err != nil {
		return err
	}
	c.cache.mu.Lock()
	defer c.cache.mu.Unlock()
	c.cache.ownerKey = key
	return nil
}

// fields are the definitions of custom attributes.
type fields struct {
	mu    sync.Mutex
	keys  map[string]int32
	names map[int32]string
}

func (f *fields) set(defs []types.CustomFieldDef) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.keys, f.names = map[string]int32{}, map[int32]string{}
	for _, d := range defs {
		f.names[d.Key] = d.Name
		if d.ManagedObjectType == "" {
			f.keys[d.Name] = d.Key
		}
	}
}

// name of an attribute, "" if it was defined since the last login by somebody
// else.
func (f *fields) name(key int32) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.names[key]
}

func (f *fields) key(name string) (int32, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	key, ok := f.keys[name]
	return key, ok
}

// field is the key of an attribute, which is defined if it is not there.
func (c *Client) field(ctx context.Context, name string) (int32, error) {
	if key, ok := c.fields.key(name); ok {
		return key, nil
	}
	unlock, err := c.lock(ctx, "custom attribute "+name)
	if err != nil {
		return 0, err
	}
	defer unlock()
	if key, ok := c.fields.key(name); ok {
		return key, nil
	}
	manager := *c.session.Client().ServiceContent.CustomFieldsManager
	res, err := methods.AddCustomFieldDef(ctx, c.session, &types.AddCustomFieldDef{This: manager, Name: name})
	if err != nil {
		return 0, vsphere.Error(fmt.Sprintf("define custom attribute %s (an administrator may do that once, for all types)", name), err)
	}
	c.fields.mu.Lock()
	defer c.fields.mu.Unlock()
	c.fields.keys[name], c.fields.names[res.Returnval.Key] = res.Returnval.Key, name
	return res.Returnval.Key, nil
}

// setField writes an attribute of an object.
func (c *Client) setField(ctx context.Context, object ref, what, name, value string) error {
	key, err := c.field(ctx, name)
	if err != nil {
		return err
	}
	manager := *c.session.Client().ServiceContent.CustomFieldsManager
	props := map[string]any{propAttr + strconv.Itoa(int(key)): value}
	if value == "" {
		props[propAttr+strconv.Itoa(int(key))] = nil
	}
	c.cache.expect(object, props)
	_, err = methods.SetField(ctx, c.session, &types.SetField{This: manager, Entity: object, Key: key, Value: value})
	if err != nil {
		return c.failed(object, fmt.Sprintf("set attribute %s of %s", name, what), err)
	}
	c.write(object, props)
	return nil
}

// failed gives an error its class; an object that vCenter no longer has is
// forgotten.
func (c *Client) failed(object ref, what string, err error) error {
	c.cache.expect(object, nil)
	if vsphere.IsNotFound(err) {
		c.cache.gone(object)
	}
	return vsphere.Error(what, err)
}

// builtin names Atoll's roles, and what they allow beside reading.
var builtin = map[Role]struct {
	name       string
	privileges []string
}{
	RoleView:  {name: "ReadOnly"},
	RoleEdit:  {"Atoll namespace edit", []string{"VirtualMachine.Interact.ConsoleInteract"}},
	RoleOwner: {"Atoll namespace owner", []string{"VirtualMachine.Interact.ConsoleInteract", "VirtualMachine.Interact.PowerOff", "VirtualMachine.Interact.PowerOn", "VirtualMachine.Interact.Reset"}},
}

// roles are vSphere's.
type roles struct {
	mu   sync.Mutex
	list []types.AuthorizationRole
}

func (r *roles) set(list []types.AuthorizationRole) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = list
}

func (r *roles) id(name string) (int32, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.list, func(a types.AuthorizationRole) bool { return a.Name == name })
	if i < 0 {
		return 0, false
	}
	return r.list[i].RoleId, true
}

func (r *roles) name(id int32) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.list, func(a types.AuthorizationRole) bool { return a.RoleId == id })
	if i < 0 {
		return strconv.Itoa(int(id))
	}
	return r.list[i].Name
}

// roleName is what a role is called in vSphere.
func (c *Client) roleName(r Role) string {
	if name := c.options.Roles[r]; name != "" {
		return name
	}
	return builtin[r].name
}

// role is the id of a role, which is made if it is one of Atoll's and missing.
func (c *Client) role(ctx context.Context, r Role) (int32, error) {
	name := c.roleName(r)
	if id, ok := c.roles.id(name); ok {
		return id, nil
	}
	if name != builtin[r].name || len(builtin[r].privileges) == 0 {
		return 0, fmt.Errorf("vCenter %s has no role %q for %s: make it, or name another: %w", c.session.Address(), name, r, errdefs.ErrInvalidArgument)
	}
	unlock, err := c.lock(ctx, "role "+name)
	if err != nil {
		return 0, err
	}
	defer unlock()
	if id, ok := c.roles.id(name); ok {
		return id, nil
	}
	manager := *c.session.Client().ServiceContent.AuthorizationManager
	res, err := methods.AddAuthorizationRole(ctx, c.session, &types.AddAuthorizationRole{This: manager, Name: name, PrivIds: builtin[r].privileges})
	if err != nil {
		return 0, vsphere.Error(fmt.Sprintf("make role %q (or name existing roles for owner, edit and view)", name), err)
	}
	c.roles.mu.Lock()
	defer c.roles.mu.Unlock()
	c.roles.list = append(c.roles.list, types.AuthorizationRole{RoleId: res.Returnval, Name: name})
	return res.Returnval, nil
}
