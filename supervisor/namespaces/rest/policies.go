package rest

import (
	"slices"

	"github.com/containerd/errdefs"
	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// policySummary is storage.Policies.Summary.
type policySummary struct {
	Policy      string `json:"policy"`
	Name        string `json:"name"`
	Description string `json:"description"`
}

// ready tells whether a policy is in vCenter; that it fits no datastore now does
// not make it another.
func (p policies) known() policies {
	var out policies
	for _, policy := range p {
		c := meta.FindStatusCondition(policy.Status.Conditions, v1alpha1.ConditionReady)
		if c == nil || c.Reason != v1alpha1.ReasonPolicyGone {
			out = append(out, policy)
		}
	}
	return out
}

func (h *Handler) readPolicies(r *call) (policies, error) {
	if err := h.require(r, privilegePolicies, "to see storage policies", scope{entities: []Entity{Root}}); err != nil {
		return nil, err
	}
	list := &v1alpha1.StoragePolicyList{}
	if err := h.client.List(r.Context(), list); err != nil {
		return nil, kubernetesError(err)
	}
	return policies(list.Items).known(), nil
}

func (h *Handler) listPolicies(r *call) (any, error) {
	list, err := h.readPolicies(r)
	wanted := r.URL.Query()["policies"]
	out := []policySummary{}
	for _, p := range list {
		if len(wanted) == 0 || slices.Contains(wanted, p.Spec.ID) {
			out = append(out, policySummary{Policy: p.Spec.ID, Name: p.Status.PolicyName, Description: p.Status.Description})
		}
	}
	return out, err
}

// checkPolicy tells which of the datastores named fit a policy.
func (h *Handler) checkPolicy(r *call) (any, error) {
	if r.URL.Query().Get("action") == "" {
		return nil, problemf(errOperationNotFound, "There is no operation %s %s without an action.", r.Method, r.URL.Path)
	}
	var spec struct {
		Datastores []string `json:"datastores"`
	}
	if err := r.decode(&spec); err != nil {
		return nil, err
	}
	list, err := h.readPolicies(r)
	if err != nil {
		return nil, err
	}
	out := struct {
		Compatible []struct {
			Datastore string `json:"datastore"`
		} `json:"compatible_datastores"`
	}{Compatible: []struct {
		Datastore string `json:"datastore"`
	}{}}
	for _, p := range list {
		if p.Spec.ID != r.PathValue("policy") {
			continue
		}
		for _, d := range p.Status.Datastores {
			if slices.Contains(spec.Datastores, d.ID) {
				out.Compatible = append(out.Compatible, struct {
					Datastore string `json:"datastore"`
				}{d.ID})
			}
		}
		return out, nil
	}
	return nil, problemf(errdefs.ErrNotFound, "There is no storage policy with id %q.", r.PathValue("policy"))
}
