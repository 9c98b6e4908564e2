package rest

import (
	"context"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/sso"
)

// administrators are who may use a template that names nobody, as vSphere has
// it.
const administrators = "Administrators"

// Self-service is the Supervisor's, as it is vSphere's: a call that names one
// of its clusters is about all of them. It is active while a template is.

// serviceSummary is NamespaceSelfService.Summary, with messages its Info.
type serviceSummary struct {
	Cluster    string            `json:"cluster"`
	Capability string            `json:"capability"`
	Status     string            `json:"status"`
	Messages   []instanceMessage `json:"messages,omitempty"`
}

const (
	capabilitySupported = "SUPPORTED"
	statusDeactivated   = "DEACTIVATED"
)

func active(t *v1alpha1.NamespaceTemplate) bool { return t.Spec.Active == nil || *t.Spec.Active }

// serviceStatus is ERROR while a template that is active cannot be used.
func serviceStatus(templates []v1alpha1.NamespaceTemplate) (status string, messages []instanceMessage) {
	status, messages = statusDeactivated, []instanceMessage{}
	for i := range templates {
		t := &templates[i]
		if !active(t) {
			continue
		}
		if status == statusDeactivated {
			status = statusRunning
		}
		if c := meta.FindStatusCondition(t.Status.Conditions, v1alpha1.ConditionReady); c != nil && c.Status == metav1.ConditionFalse {
			status = statusError
			messages = append(messages, instanceMessage{Severity: "ERROR", Details: messageOf(c.Reason, "Template "+t.Name+": "+c.Message)})
		}
	}
	return status, messages
}

func (h *Handler) templates(ctx context.Context) ([]v1alpha1.NamespaceTemplate, error) {
	list := &v1alpha1.NamespaceTemplateList{}
	if err := h.client.List(ctx, list); err != nil {
		return nil, kubernetesError(err)
	}
	return list.Items, nil
}

func (h *Handler) listSelfService(r *call) (any, error) {
	out := []serviceSummary{}
	zones, _, err := h.readable(r)
	if err != nil || len(zones) == 0 {
		return out, err
	}
	templates, err := h.templates(r.Context())
	if err != nil {
		return nil, err
	}
	status, _ := serviceStatus(templates)
	for _, z := range zones {
		out = append(out, serviceSummary{Cluster: z.Cluster, Capability: capabilitySupported, Status: status})
	}
	return out, nil
}

func (h *Handler) getSelfService(r *call) (any, error) {
	z, _, err := h.zone(r)
	if err != nil {
		return nil, err
	}
	templates, err := h.templates(r.Context())
	if err != nil {
		return nil, err
	}
	status, messages := serviceStatus(templates)
	info := struct {
		serviceSummary
		Messages []instanceMessage `json:"messages"` // never left out
	}{serviceSummary{Cluster: z.Cluster, Capability: capabilitySupported, Status: status}, messages}
	return info, nil
}

// changeSelfService is ?action=activate, activateWithTemplate and deactivate.
func (h *Handler) changeSelfService(r *call) (any, error) {
	sv, err := h.manageTemplates(r)
	if err != nil {
		return nil, err
	}
	action := r.URL.Query().Get("action")
	switch action {
	case "":
		return nil, problemf(errdefs.ErrInvalidArgument, "The action is missing: append ?action=activate, activateWithTemplate or deactivate.")
	case "activateWithTemplate":
		return nil, h.activateWithTemplate(r, sv)
	}
	on := action == "activate"
	templates, err := h.templates(r.Context())
	if err != nil {
		return nil, err
	}
	status, _ := serviceStatus(templates)
	switch {
	case on && len(templates) == 0:
		return nil, problemf(errdefs.ErrFailedPrecondition, "There is no template that could be activated: make one first, or use ?action=activateWithTemplate.")
	case on && status != statusDeactivated:
		return nil, problemf(errdefs.ErrAlreadyExists, "Self-service is active already.")
	}
	for i := range templates {
		if err := h.activate(r.Context(), templates[i].Name, on); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

func (h *Handler) activate(ctx context.Context, name string, on bool) error {
	return h.changeTemplate(ctx, name, func(t *v1alpha1.NamespaceTemplate) error {
		if active(t) != on {
			t.Spec.Active = &on
		}
		return nil
	})
}

func (h *Handler) activateWithTemplate(r *call, sv *v1alpha1.Supervisor) error {
	var spec templateSpec
	if err := r.decode(&spec); err != nil {
		return err
	}
	err := h.createTemplate(r.Context(), sv, &spec, true)
	if !errdefs.IsAlreadyExists(err) {
		return err
	}
	if err := h.updateTemplate(r.Context(), sv, spec.Template, &spec); err != nil {
		return err
	}
	return h.activate(r.Context(), spec.Template, true)
}

// templateSpec is NamespaceTemplates.CreateSpec and NamespaceSelfService's
// ActivateTemplateSpec; UpdateSpec is the same without the name.
type templateSpec struct {
	Template         string         `json:"template"`
	ResourceSpec     *quota         `json:"resource_spec"`
	StorageSpecs     *[]storageSpec `json:"storage_specs"`
	VMService        *vmServiceSpec `json:"vm_service_spec"`
	Permissions      *[]subjectSpec `json:"permissions"`
	Networks         absent         `json:"networks"`
	ContentLibraries absent         `json:"content_libraries"`
}

// subjectSpec is NamespaceTemplates.Subject.
type subjectSpec struct {
	SubjectType string `json:"subject_type"`
	Subject     string `json:"subject"`
	Domain      string `json:"domain"`
}

// apply writes into a template what a client sent. Subjects that vSphere does
// not know stay.
func (s *templateSpec) apply(to *v1alpha1.NamespaceTemplateSpec, env environment, whole bool) error {
	common := settings{ResourceSpec: s.ResourceSpec, StorageSpecs: s.StorageSpecs, VMService: s.VMService, Networks: s.Networks, ContentLibraries: s.ContentLibraries}
	if err := common.apply(&to.Settings, env, whole); err != nil {
		return err
	}
	if s.Permissions == nil && !whole {
		return nil
	}
	var users []v1alpha1.TemplateSubject
	if s.Permissions != nil {
		for _, p := range *s.Permissions {
			entry, err := accessSpec{SubjectType: p.SubjectType, Subject: p.Subject, Domain: p.Domain, Role: "VIEW"}.entry()
			if err != nil {
				return err
			}
			users = append(users, v1alpha1.TemplateSubject{Kind: entry.Kind, Name: entry.Name, Domain: entry.Domain})
		}
	}
	for _, u := range to.AllowedUsers {
		if u.Domain == v1alpha1.LocalDomain {
			users = append(users, u)
		}
	}
	if len(users) == 0 {
		domain := env.ssoDomain
		if domain == "" {
			domain = sso.DefaultDomain
		}
		users = []v1alpha1.TemplateSubject{{Kind: v1alpha1.GroupSubject, Name: administrators, Domain: domain}}
	}
	if !slices.Equal(users, to.AllowedUsers) {
		to.AllowedUsers = users
	}
	return nil
}

// templateView is NamespaceTemplates.Info without whose it is.
type templateView struct {
	Template     string        `json:"template"`
	ResourceSpec quota         `json:"resource_spec,omitempty"`
	StorageSpecs []storageSpec `json:"storage_specs"`
	Permissions  []subjectSpec `json:"permissions"`
	VMService    vmServiceView `json:"vm_service_spec"`
}

func viewTemplate(t *v1alpha1.NamespaceTemplate, env environment) (templateView, error) {
	s, err := viewSettings(&t.Spec.Settings, env)
	if err != nil {
		return templateView{}, err
	}
	v := templateView{Template: t.Name, ResourceSpec: s.ResourceSpec, StorageSpecs: s.StorageSpecs, VMService: s.VMService, Permissions: []subjectSpec{}}
	for _, u := range t.Spec.AllowedUsers {
		if u.Domain == v1alpha1.LocalDomain {
			continue
		}
		domain := u.Domain
		if domain == "" {
			domain = env.ssoDomain
		}
		v.Permissions = append(v.Permissions, subjectSpec{SubjectType: strings.ToUpper(string(u.Kind)), Subject: u.Name, Domain: domain})
	}
	return v, nil
}

// owner is how a call names whose templates it is about: both are the same
// Supervisor's.
type owner struct {
	Cluster    string `json:"cluster,omitempty"`
	Supervisor string `json:"supervisor,omitempty"`
}

// templatesOwner reads the Supervisor that a call names, by itself or by one of
// its clusters; the user holds the privilege there.
func (h *Handler) templatesOwner(r *call, privilege, what string) (owner, *v1alpha1.Supervisor, error) {
	if id := r.PathValue("supervisor"); id != "" {
		sv, err := h.supervisorNamed(r.Context(), id)
		if err != nil {
			return owner{}, nil, err
		}
		return owner{Supervisor: sv.Name}, sv, h.require(r, privilege, what, scopeOfZones(sv.Status.Zones))
	}
	sv, err := h.supervisor(r.Context())
	if err != nil {
		return owner{}, nil, err
	}
	z, err := h.zoneOf(r, sv, r.PathValue("cluster"))
	if err != nil {
		return owner{}, nil, err
	}
	zones := []v1alpha1.ZoneStatus{z}
	if privilege != privilegeRead { // it is about all
		zones = sv.Status.Zones
	}
	return owner{Cluster: z.Cluster}, sv, h.require(r, privilege, what, scopeOfZones(zones))
}

func (h *Handler) manageTemplates(r *call) (*v1alpha1.Supervisor, error) {
	_, sv, err := h.templatesOwner(r, privilegeSelfService, "to change self-service")
	return sv, err
}

func (h *Handler) listTemplates(r *call) (any, error) {
	of, _, err := h.templatesOwner(r, privilegeRead, "to see the templates")
	if err != nil {
		return nil, err
	}
	templates, err := h.templates(r.Context())
	type summary struct {
		owner
		Template string `json:"template"`
	}
	out := []summary{}
	for _, t := range templates {
		out = append(out, summary{of, t.Name})
	}
	return out, err
}

func (h *Handler) getTemplate(r *call) (any, error) {
	of, sv, err := h.templatesOwner(r, privilegeRead, "to see the templates")
	if err != nil {
		return nil, err
	}
	t, err := h.template(r.Context(), r.PathValue("template"))
	if err != nil {
		return nil, err
	}
	env, err := h.environment(r.Context(), sv, t.Spec.Zones)
	if err != nil {
		return nil, err
	}
	view, err := viewTemplate(t, env)
	return struct {
		owner
		templateView
	}{of, view}, err
}

func (h *Handler) postTemplate(r *call) (any, error) {
	sv, err := h.manageTemplates(r)
	if err != nil {
		return nil, err
	}
	var spec templateSpec
	if err := r.decode(&spec); err != nil {
		return nil, err
	}
	templates, err := h.templates(r.Context())
	if err != nil {
		return nil, err
	}
	status, _ := serviceStatus(templates)
	return nil, h.createTemplate(r.Context(), sv, &spec, status != statusDeactivated)
}

func (h *Handler) patchTemplate(r *call) (any, error) {
	sv, err := h.manageTemplates(r)
	if err != nil {
		return nil, err
	}
	var spec templateSpec
	if err := r.decode(&spec); err != nil {
		return nil, err
	}
	if spec.Template != "" {
		return nil, problemf(errUnexpectedInput, "template is not part of an update: a template is not renamed.")
	}
	return nil, h.updateTemplate(r.Context(), sv, r.PathValue("template"), &spec)
}

func (h *Handler) createTemplate(ctx context.Context, sv *v1alpha1.Supervisor, spec *templateSpec, on bool) error {
	if errs := validation.IsDNS1123Label(spec.Template); len(errs) > 0 {
		return problemf(errdefs.ErrInvalidArgument, "%q is no name of a template: %s.", spec.Template, strings.Join(errs, "; "))
	}
	env, err := h.templateEnvironment(ctx, sv, nil)
	if err != nil {
		return err
	}
	t := &v1alpha1.NamespaceTemplate{ObjectMeta: metav1.ObjectMeta{Name: spec.Template}}
	t.Spec.Active = &on
	if err := spec.apply(&t.Spec, env, true); err != nil {
		return err
	}
	err = h.client.Create(ctx, t, fieldOwner)
	if apierrors.IsAlreadyExists(err) {
		return problemf(errdefs.ErrAlreadyExists, "There is a template %q already.", spec.Template)
	}
	return kubernetesError(err)
}

func (h *Handler) updateTemplate(ctx context.Context, sv *v1alpha1.Supervisor, name string, spec *templateSpec) error {
	return h.changeTemplate(ctx, name, func(t *v1alpha1.NamespaceTemplate) error {
		env, err := h.templateEnvironment(ctx, sv, t.Spec.Zones)
		if err != nil {
			return err
		}
		return spec.apply(&t.Spec, env, false)
	})
}

func (h *Handler) templateEnvironment(ctx context.Context, sv *v1alpha1.Supervisor, zones []string) (environment, error) {
	env, err := h.environment(ctx, sv, zones)
	if err != nil {
		return environment{}, err
	}
	env.classes, err = h.classNames(ctx)
	return env, err
}

func (h *Handler) template(ctx context.Context, name string) (*v1alpha1.NamespaceTemplate, error) {
	t := &v1alpha1.NamespaceTemplate{}
	err := h.client.Get(ctx, client.ObjectKey{Name: name}, t)
	if apierrors.IsNotFound(err) {
		return nil, problemf(errdefs.ErrNotFound, "There is no template %q.", name)
	}
	return t, kubernetesError(err)
}

// changeTemplate writes nothing where nothing changes.
func (h *Handler) changeTemplate(ctx context.Context, name string, edit func(*v1alpha1.NamespaceTemplate) error) error {
	return retryConflict(ctx, "Template "+name, func() error {
		t, err := h.template(ctx, name)
		if err != nil {
			return err
		}
		was := t.DeepCopy()
		if err := edit(t); err != nil {
			return err
		}
		if equalJSON(was.Spec, t.Spec) {
			return nil
		}
		return kubernetesError(h.client.Update(ctx, t, fieldOwner))
	})
}
