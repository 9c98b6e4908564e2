package login

import (
	"context"
	"fmt"
	"slices"

	authorizationv1 "k8s.io/api/authorization/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/sso"
)

// Namespaces lists, in order, those in which a RoleBinding names the user or
// one of the groups; and, for somebody who may see the pods of the whole
// cluster, every SupervisorNamespace's. It asks the API server's own rights, so
// that it neither shows a namespace that the user could not enter nor hides one
// that was opened by hand.
func Namespaces(ctx context.Context, client kubernetes.Interface, who Identity) ([]string, error) {
	bindings, err := client.RbacV1().RoleBindings("").List(ctx, metav1.ListOptions{ResourceVersion: "0"})
	if err != nil {
		return nil, fmt.Errorf("namespaces of a user: %w", err)
	}
	names := map[string]bool{}
	groups := map[string]bool{}
	for _, g := range who.Groups {
		groups[g.Subject()] = true
	}
	for _, b := range bindings.Items {
		if slices.ContainsFunc(b.Subjects, func(s rbacv1.Subject) bool {
			return s.Kind == rbacv1.UserKind && s.Name == who.User.Subject() || s.Kind == rbacv1.GroupKind && groups[s.Name]
		}) {
			names[b.Namespace] = true
		}
	}
	everywhere, err := seesAll(ctx, client, who)
	if err != nil {
		return nil, err
	}
	if everywhere {
		all, err := client.CoreV1().Namespaces().List(ctx, metav1.ListOptions{LabelSelector: v1alpha1.LabelNamespace, ResourceVersion: "0"})
		if err != nil {
			return nil, fmt.Errorf("namespaces of a user: %w", err)
		}
		for _, n := range all.Items {
			names[n.Name] = true
		}
	}
	out := []string{}
	for n := range names {
		out = append(out, n)
	}
	slices.Sort(out)
	return out, nil
}

func seesAll(ctx context.Context, client kubernetes.Interface, who Identity) (bool, error) {
	review, err := client.AuthorizationV1().SubjectAccessReviews().Create(ctx, &authorizationv1.SubjectAccessReview{
		Spec: authorizationv1.SubjectAccessReviewSpec{
			User: who.User.Subject(), Groups: subjects(who.Groups),
			ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: "list", Resource: "pods"},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return false, fmt.Errorf("rights of a user: %w", err)
	}
	return review.Status.Allowed, nil
}

func subjects(principals []sso.Principal) []string {
	var out []string
	for _, p := range principals {
		out = append(out, p.Subject())
	}
	return out
}
