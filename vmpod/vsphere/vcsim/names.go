package vcsim

import (
	"slices"
	"strings"
	"unicode"

	"github.com/vmware/govmomi/vim25/types"
)

// names finds objects by name, so that whether a name is taken costs the same
// where a parent has ten children or thousands. A key is a name as it compares
// (folded). The server's mu guards it.
type names map[string][]types.ManagedObjectReference

// folded is one text for all names that strings.EqualFold holds for the same.
func folded(name string) string {
	return strings.Map(func(r rune) rune {
		least := r
		for x := unicode.SimpleFold(r); x != r; x = unicode.SimpleFold(x) {
			least = min(least, x)
		}
		return least
	}, name)
}

// rename says that an object has another name from now on; "" is none.
func (n names) rename(ref types.ManagedObjectReference, old, now string) {
	if key := folded(old); key != "" {
		n[key] = slices.DeleteFunc(n[key], func(r types.ManagedObjectReference) bool { return r == ref })
		if len(n[key]) == 0 {
			delete(n, key)
		}
	}
	if key := folded(now); key != "" {
		n[key] = append(n[key], ref)
	}
}

// child is the object of a name below a parent, other than self.
func (n names) child(s *Server, parent, self types.ManagedObjectReference, name string) (found types.ManagedObjectReference, ok bool) {
	for _, ref := range n[folded(name)] {
		if ref != self && s.parent(ref) == parent {
			return ref, true
		}
	}
	return found, false
}
