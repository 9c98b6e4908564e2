package vcsim

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// What is kept, by key: "vcenter", "ResourcePool/resgroup-1", "role/101",
// "field/101", "category/ID", "tag/ID", "policy/ID", "disk/ID".

// A vcenterRecord is what the server itself remembers.
type vcenterRecord struct {
	InstanceUUID string   `json:"instanceUUID"`
	Parts        []string `json:"parts"`
	LastID       int      `json:"lastID"`
	LastRole     int32    `json:"lastRole"`
	LastField    int32    `json:"lastField"`
}

// An objectRecord is one entity. Parent, Name, Config, Mirror and Host are of those
// that users or pods made; of others what was set on them is kept alone.
type objectRecord struct {
	Parent      string                    `json:"parent,omitempty"`
	Name        string                    `json:"name,omitempty"`
	Config      *types.ResourceConfigSpec `json:"config,omitempty"`
	Mirror      *Mirror                   `json:"mirror,omitempty"`
	Host        *Host                     `json:"host,omitempty"`
	Values      map[int32]string          `json:"values,omitempty"`
	Permissions []types.Permission        `json:"permissions,omitempty"`
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }

func keyOf(ref types.ManagedObjectReference) string { return ref.Type + "/" + ref.Value }

// fixed tells whether the configuration made an object.
func (s *Server) fixed(ref types.ManagedObjectReference) bool { return s.built[ref] }

// save keeps entities as they are now; those that are gone are forgotten. Call
// it with s.mu held.
func (s *Server) save(refs ...types.ManagedObjectReference) error {
	if s.restoring {
		return nil
	}
	values := map[string]any{}
	for _, ref := range refs {
		e, ok := s.vim.Get(ref).(mo.Entity)
		if !ok {
			values[keyOf(ref)] = nil
			continue
		}
		r := objectRecord{Permissions: s.access.permissions[ref]}
		for _, v := range s.values(e) {
			if x, ok := v.(*types.CustomFieldStringValue); ok {
				if r.Values == nil {
					r.Values = map[int32]string{}
				}
				r.Values[x.Key] = x.Value
			}
		}
		if !s.fixed(ref) {
			r.Parent, r.Name = s.parent(ref).Value, s.nameOf(ref)
			if p, ok := s.pool(ref); ok {
				config := s.poolItself(p).Config
				r.Config = &config
			}
			s.mirrors.mu.RLock()
			if m, ok := s.mirrors.specs[ref]; ok {
				r.Mirror = &m
			}
			s.mirrors.mu.RUnlock()
			if h, ok := s.inventory.shown[ref]; ok {
				r.Host = &h
			}
		}
		values[keyOf(ref)] = r
		if n := idNumber(ref); n > s.lastID {
			s.lastID = n
			values["vcenter"] = s.record()
		}
	}
	return s.store.put(values)
}

// idNumber is the number at the end of an id.
func idNumber(ref types.ManagedObjectReference) (n int) {
	digits := ref.Value[len(strings.TrimRight(ref.Value, "0123456789")):]
	_, _ = fmt.Sscanf(digits, "%d", &n)
	return n
}

func (s *Server) record() vcenterRecord {
	return vcenterRecord{InstanceUUID: s.instanceUUID, Parts: s.inventory.parts, LastID: s.lastID, LastRole: s.lastRole, LastField: s.lastField}
}

func (s *Server) saveRole(id int32) error {
	if s.restoring {
		return nil
	}
	var v any
	if r := s.access.role(id); r != nil {
		kept := *r
		kept.Info = nil // an interface, which JSON cannot be read into; it is made of the name
		v = kept
	}
	return s.store.put(map[string]any{fmt.Sprintf("role/%d", id): v, "vcenter": s.record()})
}

func (s *Server) saveField(key int32) error {
	var v any
	if d, ok := s.field(func(d types.CustomFieldDef) bool { return d.Key == key }); ok {
		v = d
	}
	return s.store.put(map[string]any{fmt.Sprintf("field/%d", key): v, "vcenter": s.record()})
}

// broken is the answer when the change was made and could not be kept.
func (c *call) broken(err error) soap.HasFault {
	c.s.log.Error("the inventory could not be kept", "err", err)
	return refuse(brokenFault(err))
}

func brokenFault(err error) types.BaseMethodFault {
	return &types.SystemError{RuntimeFault: reason(err.Error()), Reason: err.Error()}
}

// kept decodes the value of a key; false if there is none.
func (s *Server) kept(key string, into any) (bool, error) {
	raw, ok := s.store.live[key]
	if !ok {
		return false, nil
	}
	if err := json.Unmarshal(raw, into); err != nil {
		return false, fmt.Errorf("vcsim: kept %s cannot be read; restore the data directory from a backup: %w: %w", key, errdefs.ErrDataLoss, err)
	}
	return true, nil
}

// loadSelf reads what the server itself remembers, before it builds anything.
func (s *Server) loadSelf() error {
	var r vcenterRecord
	ok, err := s.kept("vcenter", &r)
	if err != nil {
		return err
	}
	if !ok {
		r.InstanceUUID = uuid.NewString()
	}
	s.instanceUUID, s.inventory.parts, s.lastID, s.lastRole, s.lastField = r.InstanceUUID, r.Parts, max(r.LastID, firstDynamicID), r.LastRole, r.LastField
	return nil
}

// restore puts back what users made.
func (s *Server) restore() error {
	s.restoring = true
	defer func() { s.restoring = false }()
	if err := s.restoreDefinitions(); err != nil {
		return err
	}
	records := map[types.ManagedObjectReference]objectRecord{}
	for _, key := range sortedKeys(s.store.live) {
		kind, id, _ := strings.Cut(key, "/")
		if id == "" || !isEntity(kind) {
			continue
		}
		var r objectRecord
		if _, err := s.kept(key, &r); err != nil {
			return err
		}
		records[types.ManagedObjectReference{Type: kind, Value: id}] = r
	}
	for _, ref := range slices.SortedFunc(maps.Keys(records), compareRefs) {
		if r := records[ref]; r.Host != nil {
			if err := s.restoreHost(ref, r.Parent, *r.Host); err != nil {
				return err
			}
		}
	}
	for _, kind := range []string{"Folder", "ResourcePool", "VirtualMachine"} {
		for _, ref := range slices.SortedFunc(maps.Keys(records), compareRefs) {
			if ref.Type == kind {
				s.restoreObject(ref, records, 0)
			}
		}
	}
	for ref, r := range records {
		if e, ok := s.vim.Get(ref).(mo.Entity); ok {
			s.restoreSettings(e, ref, r)
		}
	}
	return nil
}

func isEntity(kind string) bool {
	switch kind {
	case "role", "field", "category", "tag", "policy", "disk":
		return false
	}
	return true
}

func (s *Server) restoreDefinitions() error {
	for _, key := range sortedKeys(s.store.live) {
		var err error
		switch kind, _, _ := strings.Cut(key, "/"); kind {
		case "role":
			var r types.AuthorizationRole
			_, err = s.kept(key, &r)
			r.Info = &types.Description{Label: r.Name, Summary: r.Name}
			s.access.roles = append(s.access.roles, r)
		case "field":
			var d types.CustomFieldDef
			_, err = s.kept(key, &d)
			s.fields = append(s.fields, d)
		}
		if err != nil {
			return err
		}
	}
	slices.SortFunc(s.fields, func(a, b types.CustomFieldDef) int { return int(a.Key - b.Key) })
	s.update(s.vim.Get(s.authorizationManager), set("roleList", slices.Clone(s.access.roles)))
	s.update(s.vim.Get(s.customFieldsManager), set("field", slices.Clone(s.fields)))
	for _, e := range s.vim.All("") {
		e.Entity().AvailableField = s.availableFields(e.Reference().Type)
	}
	return nil
}

// restoreObject makes one object, its parents first. What cannot be put back
// (its cluster is gone) is left out, and said.
func (s *Server) restoreObject(ref types.ManagedObjectReference, records map[types.ManagedObjectReference]objectRecord, depth int) {
	r := records[ref]
	if s.vim.Get(ref) != nil || r.Name == "" || depth > 64 {
		return
	}
	if r.Mirror != nil {
		at, err := s.placeOf(*r.Mirror)
		if err != nil {
			s.log.Warn("a mirror is not put back", "vm", r.Name, "err", err)
			return
		}
		s.putMirror(ref, *r.Mirror, at)
		s.show(ref, *r.Mirror, at)
		return
	}
	parent := types.ManagedObjectReference{Type: ref.Type, Value: r.Parent}
	s.restoreObject(parent, records, depth+1)
	switch p := s.vim.Get(parent).(type) {
	case *simulator.ResourcePool:
		if r.Config != nil {
			s.putPool(p, ref, r.Name, *r.Config)
			s.refresh(p)
			return
		}
	case *simulator.Folder:
		s.putFolder(p, ref, r.Name)
		return
	}
	s.log.Warn("an object is not put back: its parent is gone", "object", ref.String(), "name", r.Name)
}

func (s *Server) restoreSettings(e mo.Entity, ref types.ManagedObjectReference, r objectRecord) {
	var values []types.BaseCustomFieldValue
	for _, key := range sortedKeys(r.Values) {
		values = append(values, &types.CustomFieldStringValue{CustomFieldValue: types.CustomFieldValue{Key: key}, Value: r.Values[key]})
	}
	if values != nil {
		s.setValues(e, values)
	}
	if len(r.Permissions) > 0 {
		s.access.permissions[ref] = r.Permissions
		s.update(e, set("permission", s.access.grants(ref)))
	}
}
