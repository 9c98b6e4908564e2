package vc

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Diff says what Ensure would mend: where vSphere is not as want says. To tell
// an administrator's change from one of the spec, give it what was last in step
// as want. It is pure; the order is that of zones, the folder last.
func Diff(want Namespace, have State) []Drift {
	var all []Drift
	for _, w := range want.Pools {
		p, others := poolOf(have, w.Zone)
		if p == nil {
			all = append(all, Drift{Field: FieldMissing, Zone: w.Zone, Object: poolObject(want.Name), Want: "a pool", Have: "none",
				Message: fmt.Sprintf("resource pool %q%s was deleted, or its attribute %s was changed", want.Name, inZone(w.Zone), AttributeOwner)})
			continue
		}
		all = append(all, diffPool(want, w, *p)...)
		for _, o := range others {
			all = append(all, extra(o))
		}
	}
	for _, p := range have.Pools {
		if !slices.ContainsFunc(want.Pools, func(w Pool) bool { return w.Zone == p.Zone }) {
			all = append(all, extra(p))
		}
	}
	return append(append(all, diffFolder(want, have)...), diffAccess(want, have)...)
}

func extra(p PoolState) Drift {
	return Drift{Field: FieldExtra, Zone: p.Zone, Object: poolObject(p.Path), Want: "none", Have: p.ID,
		Message: fmt.Sprintf("resource pool %q bears the namespace's mark, and is one too many", p.Path)}
}

func poolObject(path string) string { return fmt.Sprintf("resource pool %q", path) }

func inZone(zone string) string {
	if zone == "" {
		return ""
	}
	return " of zone " + zone
}

// poolOf is the namespace's pool in a zone, and what there is beside it.
func poolOf(have State, zone string) (*PoolState, []PoolState) {
	var first *PoolState
	var others []PoolState
	for i := range have.Pools {
		switch p := &have.Pools[i]; {
		case p.Zone != zone:
		case first == nil:
			first = p
		default:
			others = append(others, *p)
		}
	}
	return first, others
}

func diffPool(ns Namespace, want Pool, have PoolState) []Drift {
	var all []Drift
	add := func(f Field, w, h, message string) {
		d := Drift{Field: f, Zone: want.Zone, Object: poolObject(have.Path), Want: w, Have: h, Message: poolObject(have.Path) + " " + message}
		if d.Limits() {
			d.Pool = &have.Pool
		}
		all = append(all, d)
	}
	if w, h := normal(want.CPU), normal(have.CPU); w != h {
		add(FieldCPU, w.text("MHz"), h.text("MHz"), fmt.Sprintf("has CPU %s in place of %s", h.text("MHz"), w.text("MHz")))
	}
	if w, h := normal(want.Memory), normal(have.Memory); w != h {
		add(FieldMemory, w.text("MiB"), h.text("MiB"), fmt.Sprintf("has memory %s in place of %s", h.text("MiB"), w.text("MiB")))
	}
	if have.Name != ns.Name {
		add(FieldName, ns.Name, have.Name, "should be called "+ns.Name)
	}
	if !have.InPlace {
		add(FieldParent, "the parent pool", have.ParentID, "was moved away from the parent pool")
	}
	if have.Description != ns.Description {
		add(FieldDescription, ns.Description, have.Description, "has another description")
	}
	for _, name := range slices.Sorted(maps.Keys(ns.Attributes)) {
		if w, h := ns.Attributes[name], have.Attributes[name]; w != h {
			add(FieldAttribute, name+"="+w, name+"="+h, fmt.Sprintf("has %q as attribute %s in place of %q", h, name, w))
		}
	}
	return all
}

func diffFolder(want Namespace, have State) []Drift {
	f := have.Folder
	if f == nil {
		return []Drift{{Field: FieldMissing, Object: fmt.Sprintf("folder %q", want.Name), Want: "a folder", Have: "none",
			Message: fmt.Sprintf("VM folder %q was deleted, or its attribute %s was changed", want.Name, AttributeOwner)}}
	}
	object := fmt.Sprintf("VM folder %q", f.Path)
	var all []Drift
	if f.Name != want.Name {
		all = append(all, Drift{Field: FieldName, Object: object, Want: want.Name, Have: f.Name, Message: object + " should be called " + want.Name})
	}
	if !f.InPlace {
		all = append(all, Drift{Field: FieldParent, Object: object, Want: "the parent folder", Have: f.ParentID, Message: object + " was moved away from the parent folder"})
	}
	return all
}

func diffAccess(want Namespace, have State) []Drift {
	if want.Access == nil || len(have.Pools) == 0 || have.Folder == nil {
		return nil
	}
	w, h := accessText(want.Access), accessText(have.Access)
	if w == h && have.AccessUneven == nil {
		return nil
	}
	if have.AccessUneven != nil {
		h = "other permissions on the pools than on the folder"
	}
	return []Drift{{Field: FieldAccess, Object: poolObject(have.Pools[0].Path), Want: w, Have: h,
		Message: fmt.Sprintf("the permissions of namespace %s are %s in place of %s", want.Name, h, w)}}
}

// normal has one form for what means the same.
func normal(a Allocation) Allocation {
	if a.Shares.Level == "" {
		a.Shares.Level = SharesNormal
	}
	if a.Shares.Level != SharesCustom {
		a.Shares.Value = 0
	}
	if a.Limit < 0 {
		a.Limit = Unlimited
	}
	return a
}

// text is "limit 2000 MHz, reservation 500 MHz, shares normal".
func (a Allocation) text(unit string) string {
	limit := "no limit"
	if a.Limit != Unlimited {
		limit = fmt.Sprintf("limit %d %s", a.Limit, unit)
	}
	shares := string(a.Shares.Level)
	if a.Shares.Level == SharesCustom {
		shares = fmt.Sprint(a.Shares.Value)
	}
	expandable := ""
	if a.Fixed {
		expandable = " (fixed)"
	}
	return fmt.Sprintf("%s, reservation %d %s%s, shares %s", limit, a.Reservation, unit, expandable, shares)
}

// SameAccess tells whether two access lists let in the same with the same roles.
func SameAccess(a, b []Access) bool { return slices.Equal(lowered(a), lowered(b)) }

// lowered has one form for what names the same: vCenter shows domains in
// capitals, and subjects as the identity source has them.
func lowered(access []Access) []Access {
	out := make([]Access, 0, len(access))
	for _, a := range access {
		a.Subject, a.Domain = strings.ToLower(a.Subject), strings.ToLower(a.Domain)
		out = append(out, a)
	}
	slices.SortFunc(out, compareAccess)
	return slices.Compact(out)
}

func compareAccess(a, b Access) int {
	return strings.Compare(fmt.Sprint(a.Domain, "\\", a.Subject, a.Group, a.Role), fmt.Sprint(b.Domain, "\\", b.Subject, b.Group, b.Role))
}

func accessText(access []Access) string {
	var parts []string
	for _, a := range lowered(access) {
		who := principal(a)
		if a.Group {
			who = "group " + who
		}
		parts = append(parts, fmt.Sprintf("%s: %s", who, a.Role))
	}
	if len(parts) == 0 {
		return "nobody"
	}
	return strings.Join(parts, ", ")
}

// principal is "DOMAIN\subject", or the subject alone.
func principal(a Access) string {
	if a.Domain == "" {
		return a.Subject
	}
	return a.Domain + `\` + a.Subject
}

// Split shares an allocation out over n zones, the first getting what is left
// over. Shares and expandability are the same in each. A limit of fewer units
// than zones is 1 each, since 0 is none.
func Split(a Allocation, n int) []Allocation {
	parts := make([]Allocation, n)
	for i := range parts {
		parts[i] = a
		parts[i].Reservation = part(a.Reservation, n, i)
		if a.Limit > 0 {
			parts[i].Limit = max(part(a.Limit, n, i), 1)
		}
	}
	return parts
}

func part(total int64, n, i int) int64 {
	each := total / int64(n)
	if i == 0 {
		return each + total%int64(n)
	}
	return each
}
