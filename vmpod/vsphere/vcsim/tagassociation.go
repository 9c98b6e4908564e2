package vcsim

import (
	"net/http"
	"slices"

	"github.com/vmware/govmomi/vim25/types"
)

// An objectID is how REST names an object.
type objectID struct {
	Type string `json:"type"`
	ID   string `json:"id"`
}

func (o objectID) ref() types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: o.Type, Value: o.ID}
}

func objectIDs(refs []types.ManagedObjectReference) []objectID {
	ids := []objectID{}
	for _, ref := range refs {
		ids = append(ids, objectID{ref.Type, ref.Value})
	}
	return ids
}

func (t *tagSet) of(ref types.ManagedObjectReference) []string {
	ids := []string{}
	for _, id := range sortedKeys(t.tags) {
		if slices.Contains(t.tags[id].Objects, ref) {
			ids = append(ids, id)
		}
	}
	return ids
}

// associate serves what is about several tags.
func (c *tagCall) associate() {
	var spec struct {
		Object  objectID   `json:"object_id"`
		Tags    []string   `json:"tag_ids"`
		Objects []objectID `json:"object_ids"`
	}
	if !c.decode(&spec) {
		return
	}
	switch c.r.URL.Query().Get("~action") {
	case "list-attached-tags":
		c.value(c.s.tags.of(spec.Object.ref()))
	case "list-attached-objects-on-tags":
		all := []map[string]any{}
		for _, id := range spec.Tags {
			if x := c.s.tags.tags[id]; x != nil {
				all = append(all, map[string]any{"tag_id": id, "object_ids": objectIDs(x.Objects)})
			}
		}
		c.value(all)
	case "list-attached-tags-on-objects":
		all := []map[string]any{}
		for _, o := range spec.Objects {
			all = append(all, map[string]any{"object_id": o, "tag_ids": c.s.tags.of(o.ref())})
		}
		c.value(all)
	case "attach-multiple-tags-to-object":
		c.batch(spec.Tags, spec.Object, true)
	case "detach-multiple-tags-from-object":
		c.batch(spec.Tags, spec.Object, false)
	default:
		c.fail(http.StatusNotFound, "not_found", "there is no such action")
	}
}

func (c *tagCall) batch(ids []string, o objectID, attach bool) {
	if !c.mayTag(o) {
		return
	}
	errors := []map[string]string{}
	for _, id := range ids {
		if kind, message := c.s.setTag(id, o.ref(), attach); kind != "" {
			errors = append(errors, map[string]string{"type": "cis.tagging." + kind + ".error", "default_message": message})
		}
	}
	c.value(map[string]any{"success": len(errors) == 0, "error_messages": errors})
}

// associateTag serves what is about one tag.
func (c *tagCall) associateTag() {
	var spec struct {
		Object  objectID   `json:"object_id"`
		Objects []objectID `json:"object_ids"`
	}
	x := c.tag(c.id)
	if x == nil || !c.decode(&spec) {
		return
	}
	switch action := c.r.URL.Query().Get("~action"); action {
	case "list-attached-objects":
		c.value(objectIDs(x.Objects))
	case "attach", "detach":
		if !c.mayTag(spec.Object) {
			return
		}
		if _, message := c.s.setTag(c.id, spec.Object.ref(), action == "attach"); message != "" {
			c.fail(http.StatusBadRequest, "invalid_argument", message)
		}
	case "attach-tag-to-multiple-objects":
		for _, o := range spec.Objects {
			if !c.mayTag(o) {
				return
			}
		}
		for _, o := range spec.Objects {
			if _, message := c.s.setTag(c.id, o.ref(), true); message != "" {
				c.fail(http.StatusBadRequest, "invalid_argument", message)
				return
			}
		}
		c.value(map[string]any{"success": true})
	default:
		c.fail(http.StatusNotFound, "not_found", "there is no such action")
	}
}

// mayTag needs both: the tags', and the object's (vSphere Tagging Privileges).
func (c *tagCall) mayTag(o objectID) bool {
	if !c.exists(o.ref()) {
		c.fail(http.StatusNotFound, "not_found", "there is no object "+o.ref().String())
		return false
	}
	return c.may("InventoryService.Tagging.AttachTag", c.s.root) && c.may("InventoryService.Tagging.ObjectAttachable", o.ref())
}

// setTag attaches or detaches; it is idempotent. A category of cardinality
// SINGLE lets an object have one of its tags.
func (s *Server) setTag(id string, ref types.ManagedObjectReference, attach bool) (kind, message string) {
	x := s.tags.tags[id]
	if x == nil {
		return "objectNotFound", "there is no tag " + id
	}
	category := s.tags.categories[x.CategoryID]
	rest := without(x.Objects, ref)
	if !attach {
		x.Objects = rest
		s.tags.changed("tag/"+id, x)
		return "", ""
	}
	if len(category.AssociableTypes) > 0 && !slices.Contains(category.AssociableTypes, ref.Type) {
		return "invalidArgument", "tags of category " + category.Name + " are not for a " + ref.Type
	}
	for _, other := range s.tags.of(ref) {
		if other != id && category.Cardinality == "SINGLE" && s.tags.tags[other].CategoryID == x.CategoryID {
			return "cardinality", "the object has a tag of category " + category.Name + " already, which allows one"
		}
	}
	x.Objects = append(rest, ref)
	s.tags.changed("tag/"+id, x)
	return "", ""
}
