package vcsim

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"

	"github.com/google/uuid"
	"github.com/vmware/govmomi/vapi/tags"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

const tagging = "/rest/com/vmware/cis/tagging/"

// tagSet are categories, tags and what they are attached to. The server's mu
// guards it.
type tagSet struct {
	categories map[string]*tags.Category
	tags       map[string]*tagRecord
	changed    func(key string, value any)
}

// A tagRecord is a tag and the objects that have it.
type tagRecord struct {
	tags.Tag
	Objects []types.ManagedObjectReference `json:"objects,omitempty"`
}

// has tells whether an object has a tag, by names.
func (t *tagSet) has(ref types.ManagedObjectReference, category, name string) bool {
	for _, x := range t.tags {
		if c := t.categories[x.CategoryID]; c != nil && c.Name == category && x.Name == name && slices.Contains(x.Objects, ref) {
			return true
		}
	}
	return false
}

// forget takes an object's tags away.
func (t *tagSet) forget(ref types.ManagedObjectReference) {
	for id, x := range t.tags {
		if slices.Contains(x.Objects, ref) {
			x.Objects = without(x.Objects, ref)
			t.changed("tag/"+id, x)
		}
	}
}

// loadTags reads them, and serves them.
func (s *Server) loadTags() error {
	s.tags = tagSet{categories: map[string]*tags.Category{}, tags: map[string]*tagRecord{}, changed: func(key string, value any) {
		if err := s.store.put(map[string]any{key: value}); err != nil {
			s.log.Error("the inventory could not be kept", "err", err)
		}
	}}
	for _, key := range sortedKeys(s.store.live) {
		if id, ok := strings.CutPrefix(key, "category/"); ok {
			s.tags.categories[id] = &tags.Category{}
			if _, err := s.kept(key, s.tags.categories[id]); err != nil {
				return err
			}
		}
		if id, ok := strings.CutPrefix(key, "tag/"); ok {
			s.tags.tags[id] = &tagRecord{}
			if _, err := s.kept(key, s.tags.tags[id]); err != nil {
				return err
			}
		}
	}
	return nil
}

// A tagCall is one request.
type tagCall struct {
	s   *Server
	w   http.ResponseWriter
	r   *http.Request
	who Identity
	id  string
}

func (s *Server) buildTags() {
	handle := func(pattern string, do func(*tagCall)) {
		method, path, _ := strings.Cut(pattern, " ")
		s.mux.HandleFunc(method+" "+tagging+path, func(w http.ResponseWriter, r *http.Request) {
			who, ok := s.Caller(r)
			if !ok {
				restError(w, r, http.StatusUnauthorized, "unauthenticated", "sign in at "+restSession)
				return
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			do(&tagCall{s: s, w: w, r: r, who: who, id: strings.TrimPrefix(r.PathValue("id"), "id:")})
		})
	}
	handle("GET category", func(c *tagCall) { c.value(sortedKeys(s.tags.categories)) })
	handle("POST category", (*tagCall).createCategory)
	handle("GET category/{id}", func(c *tagCall) {
		if x := c.category(c.id); x != nil {
			c.value(x)
		}
	})
	handle("PATCH category/{id}", (*tagCall).updateCategory)
	handle("DELETE category/{id}", (*tagCall).deleteCategory)
	handle("GET tag", func(c *tagCall) { c.value(sortedKeys(s.tags.tags)) })
	handle("POST tag", (*tagCall).createTag)
	handle("GET tag/{id}", func(c *tagCall) {
		if x := c.tag(c.id); x != nil {
			c.value(x.Tag)
		}
	})
	handle("POST tag/{id}", (*tagCall).tagsOfCategory)
	handle("PATCH tag/{id}", (*tagCall).updateTag)
	handle("DELETE tag/{id}", (*tagCall).deleteTag)
	handle("POST tag-association", (*tagCall).associate)
	handle("POST tag-association/{id}", (*tagCall).associateTag)
}

func (c *tagCall) value(v any) { restValue(c.w, c.r, http.StatusOK, v) }

func (c *tagCall) fail(status int, kind, message string) {
	restError(c.w, c.r, status, kind, message)
}

// may checks a privilege; it has answered if not.
func (c *tagCall) may(privilege string, on types.ManagedObjectReference) bool {
	if c.s.has(c.who, privilege, on) {
		return true
	}
	c.fail(http.StatusForbidden, "unauthorized", "missing privilege "+privilege+" on "+on.String())
	return false
}

func (c *tagCall) decode(into any) bool {
	if err := json.NewDecoder(c.r.Body).Decode(into); err != nil {
		c.fail(http.StatusBadRequest, "invalid_argument", "the body is not what is expected: "+err.Error())
		return false
	}
	return true
}

func (c *tagCall) category(id string) *tags.Category {
	x := c.s.tags.categories[id]
	if x == nil {
		c.fail(http.StatusNotFound, "not_found", "there is no category "+id)
	}
	return x
}

func (c *tagCall) tag(id string) *tagRecord {
	x := c.s.tags.tags[id]
	if x == nil {
		c.fail(http.StatusNotFound, "not_found", "there is no tag "+id)
	}
	return x
}

func (c *tagCall) createCategory() {
	var spec struct {
		Create tags.Category `json:"create_spec"`
	}
	if !c.decode(&spec) || !c.may("InventoryService.Tagging.CreateCategory", c.s.root) {
		return
	}
	x := spec.Create
	if x.Name == "" {
		c.fail(http.StatusBadRequest, "invalid_argument", "a category needs a name")
		return
	}
	for _, other := range c.s.tags.categories {
		if strings.EqualFold(other.Name, x.Name) {
			c.fail(http.StatusBadRequest, "already_exists", "there is a category "+x.Name)
			return
		}
	}
	if x.Cardinality == "" {
		x.Cardinality = "SINGLE"
	}
	x.ID, x.CategoryID = "urn:vmomi:InventoryServiceCategory:"+uuid.NewString()+":GLOBAL", ""
	c.s.tags.categories[x.ID] = &x
	c.s.tags.changed("category/"+x.ID, x)
	c.value(x.ID)
}

func (c *tagCall) updateCategory() {
	var spec struct {
		Update tags.Category `json:"update_spec"`
	}
	x := c.category(c.id)
	if x == nil || !c.decode(&spec) || !c.may("InventoryService.Tagging.EditCategory", c.s.root) {
		return
	}
	x.Patch(&spec.Update)
	c.s.tags.changed("category/"+x.ID, x)
}

func (c *tagCall) deleteCategory() {
	x := c.category(c.id)
	if x == nil || !c.may("InventoryService.Tagging.DeleteCategory", c.s.root) {
		return
	}
	for id, t := range c.s.tags.tags {
		if t.CategoryID == x.ID {
			delete(c.s.tags.tags, id)
			c.s.tags.changed("tag/"+id, nil)
		}
	}
	delete(c.s.tags.categories, x.ID)
	c.s.tags.changed("category/"+x.ID, nil)
}

func (c *tagCall) createTag() {
	var spec struct {
		Create tags.Tag `json:"create_spec"`
	}
	if !c.decode(&spec) || !c.may("InventoryService.Tagging.CreateTag", c.s.root) {
		return
	}
	x := spec.Create
	if c.category(x.CategoryID) == nil {
		return
	}
	if x.Name == "" {
		c.fail(http.StatusBadRequest, "invalid_argument", "a tag needs a name")
		return
	}
	for _, other := range c.s.tags.tags {
		if other.CategoryID == x.CategoryID && strings.EqualFold(other.Name, x.Name) {
			c.fail(http.StatusBadRequest, "already_exists", "there is a tag "+x.Name)
			return
		}
	}
	x.ID, x.TagID = "urn:vmomi:InventoryServiceTag:"+uuid.NewString()+":GLOBAL", ""
	c.s.tags.tags[x.ID] = &tagRecord{Tag: x}
	c.s.tags.changed("tag/"+x.ID, c.s.tags.tags[x.ID])
	c.value(x.ID)
}

func (c *tagCall) updateTag() {
	var spec struct {
		Update tags.Tag `json:"update_spec"`
	}
	x := c.tag(c.id)
	if x == nil || !c.decode(&spec) || !c.may("InventoryService.Tagging.EditTag", c.s.root) {
		return
	}
	x.Patch(&spec.Update)
	c.s.tags.changed("tag/"+x.ID, x)
}

func (c *tagCall) deleteTag() {
	x := c.tag(c.id)
	if x == nil || !c.may("InventoryService.Tagging.DeleteTag", c.s.root) {
		return
	}
	delete(c.s.tags.tags, x.ID)
	c.s.tags.changed("tag/"+x.ID, nil)
}

func (c *tagCall) tagsOfCategory() {
	if c.r.URL.Query().Get("~action") != "list-tags-for-category" {
		c.fail(http.StatusNotFound, "not_found", "there is no such action")
		return
	}
	ids := []string{}
	for _, id := range sortedKeys(c.s.tags.tags) {
		if c.s.tags.tags[id].CategoryID == c.id {
			ids = append(ids, id)
		}
	}
	c.value(ids)
}

// exists tells whether an object to be tagged is there.
func (c *tagCall) exists(ref types.ManagedObjectReference) bool {
	_, ok := c.s.vim.Get(ref).(mo.Entity)
	return ok
}
