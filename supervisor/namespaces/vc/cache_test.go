package vc

import (
	"testing"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/internal/vsphere"
)

// Whoever renames hears of the name that was asked for, of that object, while it
// waits.
func TestRenaming(t *testing.T) {
	c := newCache("s")
	one, other := folderRef("group-1"), folderRef("group-2")
	seen, forget := c.renaming(one, "shop")
	forgotten, forgetOther := c.renaming(other, "shop")
	forgetOther()
	named := func(r ref, name string) {
		c.Apply([]vsphere.Update{{Object: r, Props: map[string]types.AnyType{"name": name}}})
	}
	is := func(ch <-chan struct{}) bool {
		select {
		case <-ch:
			return true
		default:
			return false
		}
	}
	named(other, "shop")
	named(one, "atoll.shop")
	if is(seen) || is(forgotten) {
		t.Error("another's name, or another name, or one that nobody waits for, was heard of")
	}
	named(one, "shop")
	named(one, "shop") // once is enough
	forget()
	if !is(seen) {
		t.Error("the name was not heard of")
	}
}
