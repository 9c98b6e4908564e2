package rest

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/sso"
)

// Wire types carry vSphere's field names. In what is sent to Atoll, a nil
// pointer is a field that is missing or null; an empty list is a list.

type storageSpec struct {
	Policy string `json:"policy"` // id of the storage policy
	Limit  *int64 `json:"limit,omitempty"`
}

type accessSpec struct {
	SubjectType string `json:"subject_type"` // USER or GROUP
	Subject     string `json:"subject"`
	Domain      string `json:"domain"`
	Role        string `json:"role"` // OWNER, EDIT or VIEW
}

type vmServiceSpec struct {
	ContentLibraries *[]string `json:"content_libraries"`
	VMClasses        *[]string `json:"vm_classes"`
}

// settings is what creating, setting and updating a namespace have in common.
type settings struct {
	Description  *string        `json:"description"`
	ResourceSpec *quota         `json:"resource_spec"`
	AccessList   *[]accessSpec  `json:"access_list"`
	StorageSpecs *[]storageSpec `json:"storage_specs"`
	VMService    *vmServiceSpec `json:"vm_service_spec"`

	ContentLibraries       absent `json:"content_libraries"`
	Networks               absent `json:"networks"`
	NetworkSpec            absent `json:"network_spec"`
	NamespaceNetwork       absent `json:"namespace_network"`
	Edges                  absent `json:"edges"`
	InfrastructurePolicies absent `json:"infrastructure_policies"`
	Creator                absent `json:"creator"`
	SelfService            absent `json:"self_service_namespace"`
	SystemMetadata         absent `json:"system_metadata"`
}

// An absent field is one that vSphere has and Atoll has nothing for. It may be
// left out, or say nothing: null, false, an empty string, list or object.
type absent json.RawMessage

// UnmarshalJSON keeps what says something.
func (a *absent) UnmarshalJSON(b []byte) error {
	switch text := string(bytes.TrimSpace(b)); text {
	case "null", "false", `""`, "[]", "{}":
		*a = nil
	default:
		*a = absent(text)
	}
	return nil
}

const (
	noLibraries = "Atoll has no content libraries: images come from registries"
	noNetworks  = "all pods are on the cluster's own network"
)

// supported is ErrNotImplemented for the first field that Atoll would have to
// ignore.
func (s *settings) supported() error {
	for _, f := range []struct {
		name string
		is   bool
		why  string
	}{
		{"content_libraries", s.ContentLibraries != nil, noLibraries},
		{"vm_service_spec.content_libraries", s.VMService != nil && s.VMService.ContentLibraries != nil && len(*s.VMService.ContentLibraries) > 0, noLibraries},
		{"networks", s.Networks != nil, noNetworks},
		{"network_spec", s.NetworkSpec != nil, noNetworks},
		{"namespace_network", s.NamespaceNetwork != nil, noNetworks},
		{"edges", s.Edges != nil, "Atoll has no edges"},
		{"infrastructure_policies", s.InfrastructurePolicies != nil, "Atoll has no infrastructure policies"},
		{"creator", s.Creator != nil, "who made a self-service namespace is what Kubernetes saw: make it with kubectl from a NamespaceTemplate"},
		{"self_service_namespace", s.SelfService != nil, "self-service namespaces are made with kubectl from a NamespaceTemplate"},
		{"system_metadata", s.SystemMetadata != nil, "Atoll keeps no metadata of other products"},
	} {
		if f.is {
			return problemf(errdefs.ErrNotImplemented, "%s is not supported: %s. Leave it out.", f.name, f.why)
		}
	}
	return nil
}

// An environment is what conversions must know of the cluster.
type environment struct {
	clock     clock
	ssoDomain string
	policies  policies
	classes   map[string]bool // that there are; nil: any will do
}

// apply writes into a namespace what a client sent. With whole, what is missing
// is taken away, as PUT has it; else it stays. What vSphere has no name for
// stays as it is, and so does what already says the same.
func (s *settings) apply(to *v1alpha1.NamespaceSettings, env environment, whole bool) error {
	if err := s.supported(); err != nil {
		return err
	}
	switch {
	case s.Description != nil:
		to.Description = *s.Description
	case whole:
		to.Description = ""
	}
	if s.ResourceSpec != nil || whole {
		q := quota{}
		if s.ResourceSpec != nil {
			q = *s.ResourceSpec
		}
		if err := q.apply(to, env.clock, whole); err != nil {
			return err
		}
	}
	if err := s.applyStorage(to, env, whole); err != nil {
		return err
	}
	if err := s.applyAccess(to, env, whole); err != nil {
		return err
	}
	return s.applyClasses(to, env, whole)
}

func (s *settings) applyStorage(to *v1alpha1.NamespaceSettings, env environment, whole bool) error {
	if s.StorageSpecs == nil {
		if whole {
			to.StoragePolicies = nil
		}
		return nil
	}
	var list []v1alpha1.StoragePolicyLimit
	for _, spec := range *s.StorageSpecs {
		name, err := env.policies.name(spec.Policy, to.StoragePolicies)
		if err != nil {
			return err
		}
		entry := v1alpha1.StoragePolicyLimit{Name: name}
		if slices.ContainsFunc(list, func(l v1alpha1.StoragePolicyLimit) bool { return l.Name == name }) {
			return problemf(errdefs.ErrInvalidArgument, "storage_specs names storage policy %q twice: give it once.", spec.Policy)
		}
		if spec.Limit != nil {
			if *spec.Limit < 0 || *spec.Limit > maxMiB {
				return problemf(errdefs.ErrInvalidArgument, "storage_specs gives storage policy %q a limit of %d MiB: it is 0 to %d, leave it out for none.", spec.Policy, *spec.Limit, int64(maxMiB))
			}
			q := bytesOf(*spec.Limit)
			entry.Limit = &q
			for _, have := range to.StoragePolicies {
				if have.Name == name && have.Limit != nil && mib(*have.Limit) == *spec.Limit {
					entry.Limit = have.Limit
				}
			}
		}
		list = append(list, entry)
	}
	to.StoragePolicies = list
	return nil
}

func (s *settings) applyAccess(to *v1alpha1.NamespaceSettings, env environment, whole bool) error {
	if s.AccessList == nil {
		if whole {
			to.Access = localAccess(to.Access)
		}
		return nil
	}
	var list []v1alpha1.AccessEntry
	for _, spec := range *s.AccessList {
		entry, err := spec.entry()
		if err != nil {
			return err
		}
		if find(list, entry, env.ssoDomain) >= 0 {
			return problemf(errdefs.ErrInvalidArgument, "access_list names %s %s@%s twice: give each one role.", strings.ToLower(spec.SubjectType), spec.Subject, spec.Domain)
		}
		if i := find(to.Access, entry, env.ssoDomain); i >= 0 {
			// As it is written there.
			entry.Name, entry.Domain = to.Access[i].Name, to.Access[i].Domain
		}
		list = append(list, entry)
	}
	list = append(list, localAccess(to.Access)...)
	same := func(e v1alpha1.AccessEntry) bool { return !slices.Contains(to.Access, e) }
	if len(list) != len(to.Access) || slices.ContainsFunc(list, same) {
		to.Access = list
	}
	return nil
}

// localAccess is who vSphere does not know, and so can neither list nor take off
// the list.
func localAccess(list []v1alpha1.AccessEntry) []v1alpha1.AccessEntry {
	var local []v1alpha1.AccessEntry
	for _, a := range list {
		if a.Domain == v1alpha1.LocalDomain {
			local = append(local, a)
		}
	}
	return local
}

func (s *settings) applyClasses(to *v1alpha1.NamespaceSettings, env environment, whole bool) error {
	if s.VMService == nil || s.VMService.VMClasses == nil {
		if whole {
			to.VMClasses = nil
		}
		return nil
	}
	var list []string
	for _, class := range *s.VMService.VMClasses {
		switch {
		case slices.Contains(list, class):
			return problemf(errdefs.ErrInvalidArgument, "vm_service_spec.vm_classes names %q twice: give it once.", class)
		case env.classes != nil && !env.classes[class] && !slices.Contains(to.VMClasses, class):
			return problemf(errdefs.ErrInvalidArgument, "There is no VM class %q: make it first (govc namespace.vmclass.create), or choose one of govc namespace.vmclass.ls.", class)
		}
		list = append(list, class)
	}
	to.VMClasses = list
	return nil
}

// view is the other way: the part of an answer that the settings fill. Lists are
// never null.
type settingsView struct {
	Description  string        `json:"description"`
	ResourceSpec quota         `json:"resource_spec,omitempty"`
	AccessList   []accessSpec  `json:"access_list"`
	StorageSpecs []storageSpec `json:"storage_specs"`
	VMService    vmServiceView `json:"vm_service_spec"`
}

type vmServiceView struct {
	ContentLibraries []string `json:"content_libraries"`
	VMClasses        []string `json:"vm_classes"`
}

func viewSettings(s *v1alpha1.NamespaceSettings, env environment) (settingsView, error) {
	v := settingsView{
		Description:  s.Description,
		AccessList:   []accessSpec{},
		StorageSpecs: []storageSpec{},
		VMService:    vmServiceView{ContentLibraries: []string{}, VMClasses: append([]string{}, s.VMClasses...)},
	}
	var err error
	if v.ResourceSpec, err = quotaOf(s, env.clock); err != nil {
		return settingsView{}, err
	}
	for _, a := range s.Access {
		if a.Domain == v1alpha1.LocalDomain {
			continue
		}
		v.AccessList = append(v.AccessList, viewAccess(a, env.ssoDomain))
	}
	for _, p := range s.StoragePolicies {
		spec := storageSpec{Policy: env.policies.id(p.Name)}
		if p.Limit != nil {
			n := mib(*p.Limit)
			spec.Limit = &n
		}
		v.StorageSpecs = append(v.StorageSpecs, spec)
	}
	return v, nil
}

var (
	subjectKinds = map[string]v1alpha1.SubjectKind{"USER": v1alpha1.UserSubject, "GROUP": v1alpha1.GroupSubject}
	accessRoles  = map[string]v1alpha1.AccessRole{"OWNER": v1alpha1.RoleOwner, "EDIT": v1alpha1.RoleEdit, "VIEW": v1alpha1.RoleView}
)

func (s accessSpec) entry() (v1alpha1.AccessEntry, error) {
	kind, err := subjectKind(s.SubjectType)
	if err != nil {
		return v1alpha1.AccessEntry{}, err
	}
	role, err := accessRole(s.Role)
	if err != nil {
		return v1alpha1.AccessEntry{}, err
	}
	switch at := strings.LastIndexByte(s.Subject, '@'); {
	case s.Domain == "" || s.Domain == v1alpha1.LocalDomain:
		return v1alpha1.AccessEntry{}, problemf(errdefs.ErrInvalidArgument, "Subject %q needs a domain, such as vsphere.local.", s.Subject)
	case at >= 0 && strings.EqualFold(s.Subject[at+1:], s.Domain):
		return v1alpha1.AccessEntry{}, problemf(errdefs.ErrInvalidArgument, "Subject %q has its domain twice: give the name without it.", s.Subject)
	}
	if _, err := sso.New(s.Subject, s.Domain); err != nil {
		return v1alpha1.AccessEntry{}, err
	}
	return v1alpha1.AccessEntry{Kind: kind, Name: s.Subject, Domain: s.Domain, Role: role}, nil
}

func subjectKind(s string) (v1alpha1.SubjectKind, error) {
	kind, ok := subjectKinds[s]
	if !ok {
		return "", problemf(errdefs.ErrInvalidArgument, "%q is no type of subject: it is USER or GROUP.", s)
	}
	return kind, nil
}

func accessRole(s string) (v1alpha1.AccessRole, error) {
	role, ok := accessRoles[s]
	if !ok {
		return "", problemf(errdefs.ErrInvalidArgument, "%q is no role: it is OWNER, EDIT or VIEW.", s)
	}
	return role, nil
}

func viewAccess(a v1alpha1.AccessEntry, ssoDomain string) accessSpec {
	v := accessSpec{Subject: a.Name, Domain: a.Domain, SubjectType: strings.ToUpper(string(a.Kind)), Role: strings.ToUpper(string(a.Role))}
	if v.Domain == "" {
		v.Domain = ssoDomain
	}
	return v
}

// find is the place of the same subject in a list, or -1. vSphere does not tell
// capitals apart; no domain is the Supervisor's.
func find(list []v1alpha1.AccessEntry, e v1alpha1.AccessEntry, ssoDomain string) int {
	domain := func(d string) string {
		if d == "" {
			return ssoDomain
		}
		return d
	}
	return slices.IndexFunc(list, func(a v1alpha1.AccessEntry) bool {
		return a.Kind == e.Kind && strings.EqualFold(a.Name, e.Name) && strings.EqualFold(domain(a.Domain), domain(e.Domain))
	})
}

// policies are the storage policies of the cluster.
type policies []v1alpha1.StoragePolicy

// name is the StoragePolicy's that has an id. A namespace keeps a policy that is
// gone from vCenter, whose name stands for its id then.
func (p policies) name(id string, have []v1alpha1.StoragePolicyLimit) (string, error) {
	for _, policy := range p {
		if policy.Spec.ID == id {
			return policy.Name, nil
		}
	}
	gone := !slices.ContainsFunc(p, func(policy v1alpha1.StoragePolicy) bool { return policy.Name == id })
	for _, h := range have {
		if gone && h.Name == id {
			return id, nil
		}
	}
	return "", problemf(errdefs.ErrInvalidArgument, "There is no storage policy with id %q: GET /api/vcenter/storage/policies lists those that namespaces may use, and a new one is seen within minutes.", id)
}

func (p policies) id(name string) string {
	for _, policy := range p {
		if policy.Name == name {
			return policy.Spec.ID
		}
	}
	return name
}
