package rest

import (
	"context"
	"net/http"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// Privileges of vSphere that calls need, as its API documents them.
const (
	privilegeRead      = "System.Read"
	privilegeConfigure = "Namespaces.Configure"
	privilegeManage    = "Namespaces.Manage"
	privilegeClasses   = "VirtualMachineClasses.Manage"

	privilegeSelfService = "Namespaces.SelfServiceManage"
	privilegePolicies    = "StorageProfile.View"
)

// An Entity is an object of vCenter's inventory.
type Entity struct {
	Kind string // "ResourcePool", "ClusterComputeResource", "Folder"
	ID   string // managed object id; empty, of a Folder, is the root folder
}

func (e Entity) String() string {
	if e == Root {
		return "the root folder"
	}
	return e.Kind + " " + e.ID
}

// Root is the root folder: what holds for the whole vCenter.
var Root = Entity{Kind: "Folder"}

// A VCenter knows users and what they may do.
type VCenter interface {
	// Caller is who sent a request, by the session that it shows as vSphere's
	// clients do: "alice@vsphere.local". Anyone else is ErrUnauthenticated, and a
	// vCenter that does not answer ErrUnavailable. The session does not expire
	// while it is asked about.
	Caller(r *http.Request) (user string, err error)
	// Allowed tells for each entity whether a Caller holds the privilege there,
	// by himself or by a group. An entity that is not there is ErrNotFound; a
	// vCenter that does not answer, or does not answer the supervisor, is
	// ErrUnavailable.
	Allowed(ctx context.Context, user, privilege string, entities []Entity) ([]bool, error)
}

var errNoSession = problemf(errdefs.ErrUnauthenticated, "This call needs a session: POST /api/session with a user and password of vCenter's, and send the id that it returns as vmware-api-session-id.")

// A scope is where a right is looked up. Objects of the inventory may be gone,
// changed by hand and not yet mended: then it is above them.
type scope struct {
	entities []Entity
	above    []Entity // nil: there is nothing else
}

// require is ErrPermissionDenied unless the user holds the privilege on every
// entity of the scope.
func (h *Handler) require(r *call, privilege, what string, s scope) error {
	entities := s.entities
	allowed, err := h.vcenter.Allowed(r.Context(), r.user, privilege, entities)
	if errdefs.IsNotFound(err) && s.above != nil {
		entities = s.above
		allowed, err = h.vcenter.Allowed(r.Context(), r.user, privilege, entities)
	}
	if err != nil {
		return err
	}
	for i, ok := range allowed {
		if !ok {
			return problemf(errdefs.ErrPermissionDenied, "User %s lacks the privilege %s on %s, which is needed %s.", r.user, privilege, entities[i], what)
		}
	}
	if len(allowed) == 0 || len(allowed) != len(entities) {
		return problemf(errdefs.ErrPermissionDenied, "Where the privilege %s would be needed %s is not known.", privilege, what)
	}
	return nil
}

// granted tells for each scope whether the user holds the privilege there.
func (h *Handler) granted(r *call, privilege string, scopes []scope) ([]bool, error) {
	if len(scopes) == 0 {
		return nil, nil
	}
	var flat []Entity
	for _, s := range scopes {
		flat = append(flat, s.entities...)
	}
	allowed, err := h.vcenter.Allowed(r.Context(), r.user, privilege, flat)
	switch {
	case errdefs.IsNotFound(err) && len(scopes) == 1:
		err := h.require(r, privilege, "to see it", scope{entities: scopes[0].above})
		if errdefs.IsPermissionDenied(err) || errdefs.IsNotFound(err) {
			return []bool{false}, nil
		}
		return []bool{err == nil}, err
	case errdefs.IsNotFound(err):
		// One is gone, and vCenter does not say which: look in each half.
		half := len(scopes) / 2
		first, err := h.granted(r, privilege, scopes[:half])
		if err != nil {
			return nil, err
		}
		second, err := h.granted(r, privilege, scopes[half:])
		return append(first, second...), err
	case err != nil:
		return nil, err
	}
	out := make([]bool, len(scopes))
	for i, s := range scopes {
		n := len(s.entities)
		out[i] = n > 0 && !slices.Contains(allowed[:n], false)
		allowed = allowed[n:]
	}
	return out, nil
}

// scopeOf is where the rights in a namespace are looked up: its pools, or, while
// it has none, the clusters of its zones.
func scopeOf(ns *v1alpha1.SupervisorNamespace, sv *v1alpha1.Supervisor) scope {
	clusters := scopeOfZones(zonesOf(sv, ns.Spec.Zones))
	var pools []Entity
	for _, p := range ns.Status.Pools {
		pools = append(pools, Entity{Kind: "ResourcePool", ID: p.ID})
	}
	if len(pools) == 0 {
		return clusters
	}
	return scope{entities: pools, above: clusters.entities}
}

// scopeOfZones is the clusters, or, while none has been found, the whole
// vCenter.
func scopeOfZones(zones []v1alpha1.ZoneStatus) scope {
	var list []Entity
	for _, z := range zones {
		list = append(list, Entity{Kind: "ClusterComputeResource", ID: z.Cluster})
	}
	if len(list) == 0 {
		list = []Entity{Root}
	}
	return scope{entities: list}
}
