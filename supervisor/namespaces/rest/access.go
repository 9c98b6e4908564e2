package rest

import (
	"slices"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// roleSpec is Access.CreateSpec and Access.SetSpec; accessInfo Access.Info.
type roleSpec struct {
	Role string `json:"role"`
}

// Inherited is false: only the list of the namespace itself is looked at.
type accessInfo struct {
	Role      string `json:"role"`
	Inherited bool   `json:"inherited"`
}

// subject is who a call's path and ?type= name.
func (c *call) subject() (v1alpha1.AccessEntry, error) {
	kind := c.URL.Query().Get("type")
	if kind == "" {
		return v1alpha1.AccessEntry{}, problemf(errdefs.ErrInvalidArgument, "The type of the subject is missing: append ?type=USER or ?type=GROUP.")
	}
	spec := accessSpec{SubjectType: kind, Subject: c.PathValue("subject"), Domain: c.PathValue("domain"), Role: "VIEW"}
	return spec.entry()
}

func errNotListed(ns string, e v1alpha1.AccessEntry) error {
	return problemf(errdefs.ErrInvalidArgument, "%s %s@%s is not on the access list of namespace %s.", e.Kind, e.Name, e.Domain, ns)
}

func (h *Handler) getAccess(r *call) (any, error) {
	who, err := r.subject()
	if err != nil {
		return nil, err
	}
	ns, sv, err := h.namespace(r, privilegeRead, "to see the namespace")
	if err != nil {
		return nil, err
	}
	i := find(ns.Spec.Access, who, sv.Spec.SSODomain)
	if i < 0 {
		return nil, errNotListed(ns.Name, who)
	}
	return accessInfo{Role: viewAccess(ns.Spec.Access[i], "").Role}, nil
}

func (h *Handler) createAccess(r *call) (any, error) {
	return h.changeAccess(r, func(ns *v1alpha1.SupervisorNamespace, i int, who v1alpha1.AccessEntry) error {
		if i >= 0 {
			return problemf(errdefs.ErrAlreadyExists, "%s %s@%s is on the access list of namespace %s already: PUT changes the role.", who.Kind, who.Name, who.Domain, ns.Name)
		}
		ns.Spec.Access = append(ns.Spec.Access, who)
		return nil
	})
}

func (h *Handler) setAccess(r *call) (any, error) {
	return h.changeAccess(r, func(ns *v1alpha1.SupervisorNamespace, i int, who v1alpha1.AccessEntry) error {
		if i < 0 {
			return errNotListed(ns.Name, who)
		}
		ns.Spec.Access[i].Role = who.Role
		return nil
	})
}

func (h *Handler) changeAccess(r *call, edit func(ns *v1alpha1.SupervisorNamespace, i int, who v1alpha1.AccessEntry) error) (any, error) {
	who, err := r.subject()
	if err != nil {
		return nil, err
	}
	var spec roleSpec
	if err := r.decode(&spec); err != nil {
		return nil, err
	}
	if who.Role, err = accessRole(spec.Role); err != nil {
		return nil, err
	}
	return nil, h.change(r, func(ns *v1alpha1.SupervisorNamespace, env environment) error {
		return edit(ns, find(ns.Spec.Access, who, env.ssoDomain), who)
	})
}

func (h *Handler) deleteAccess(r *call) (any, error) {
	who, err := r.subject()
	if err != nil {
		return nil, err
	}
	return nil, h.change(r, func(ns *v1alpha1.SupervisorNamespace, env environment) error {
		i := find(ns.Spec.Access, who, env.ssoDomain)
		if i < 0 {
			return errNotListed(ns.Name, who)
		}
		ns.Spec.Access = slices.Delete(ns.Spec.Access, i, i+1)
		return nil
	})
}
