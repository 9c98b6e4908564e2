package vcsim

import (
	"bytes"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/vmware/govmomi/pbm"
	pbmmethods "github.com/vmware/govmomi/pbm/methods"
	pbmtypes "github.com/vmware/govmomi/pbm/types"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
	"github.com/vmware/govmomi/vim25/xml"
)

// tagRules is the namespace of rules that ask for a tag on the datastore.
const tagRules = "http://www.vmware.com/storage/tag"

// A policyRecord is a storage policy. Those that the configuration made are
// kept as well, since a user may rename or remove them.
type policyRecord struct {
	Name        string    `json:"name"`
	Description string    `json:"description,omitempty"`
	Gone        bool      `json:"gone,omitempty"` // of the configuration, removed by a user
	Datastores  []string  `json:"datastores,omitempty"`
	Rules       string    `json:"rules,omitempty"` // XML of PbmCapabilityConstraints
	Created     time.Time `json:"created"`
	CreatedBy   string    `json:"createdBy"`
	Changed     time.Time `json:"changed"`
	ChangedBy   string    `json:"changedBy"`
}

var pbmContent = pbmtypes.PbmServiceInstanceContent{
	AboutInfo:                 pbmtypes.PbmAboutInfo{Name: "PBM", Version: "2.0", InstanceUuid: "df09f335-be97-4f33-8c27-315faaaad6fc"},
	SessionManager:            types.ManagedObjectReference{Type: "PbmSessionManager", Value: "SessionManager"},
	CapabilityMetadataManager: types.ManagedObjectReference{Type: "PbmCapabilityMetadataManager", Value: "CapabilityMetadataManager"},
	ProfileManager:            types.ManagedObjectReference{Type: "PbmProfileProfileManager", Value: "ProfileManager"},
	ComplianceManager:         types.ManagedObjectReference{Type: "PbmComplianceManager", Value: "complianceManager"},
	PlacementSolver:           types.ManagedObjectReference{Type: "PbmPlacementSolver", Value: "placementSolver"},
}

// buildPolicies serves /pbm and makes the configured policies.
func (s *Server) buildPolicies() error {
	r := simulator.NewRegistry()
	r.Namespace, r.Path, r.Cookie, r.Handler = pbm.Namespace, pbm.Path, simulator.SOAPCookie, s.handle
	r.Put(&pbmService{pbm.ServiceInstance})
	r.Put(&profileManager{pbmContent.ProfileManager, s})
	r.Put(&placementSolver{pbmContent.PlacementSolver, s})
	r.Put(&complianceManager{pbmContent.ComplianceManager, s})
	s.svc.RegisterSDK(r)
	s.policies = map[string]policyRecord{}
	for _, key := range sortedKeys(s.store.live) {
		id, ok := strings.CutPrefix(key, "policy/")
		if !ok {
			continue
		}
		var p policyRecord
		if _, err := s.kept(key, &p); err != nil {
			return err
		}
		s.policies[id] = p
	}
	for _, c := range s.config.Policies {
		id := c.ID
		if id == "" {
			id = uuid.NewSHA1(uuid.NameSpaceOID, []byte("atoll storage policy "+c.Name)).String()
		}
		p, known := s.policies[id]
		if !known {
			p = policyRecord{Name: c.Name, Description: c.Description, Created: time.Now(), CreatedBy: "atoll", Changed: time.Now(), ChangedBy: "atoll"}
		}
		p.Datastores = c.Datastores
		if err := s.setPolicy(id, p); err != nil {
			return err
		}
	}
	return nil
}

// setPolicy keeps a policy; one of the configuration that is gone is
// remembered as such.
func (s *Server) setPolicy(id string, p policyRecord) error {
	s.policies[id] = p
	return s.store.put(map[string]any{"policy/" + id: p})
}

func (s *Server) policyIDs() []string {
	return slices.DeleteFunc(sortedKeys(s.policies), func(id string) bool { return s.policies[id].Gone })
}

type pbmService struct{ types.ManagedObjectReference }

func (*pbmService) PbmRetrieveServiceContent(*pbmtypes.PbmRetrieveServiceContent) soap.HasFault {
	return &pbmmethods.PbmRetrieveServiceContentBody{Res: &pbmtypes.PbmRetrieveServiceContentResponse{Returnval: pbmContent}}
}

type profileManager struct {
	types.ManagedObjectReference
	s *Server
}

func (m *profileManager) PbmFetchResourceType(*pbmtypes.PbmFetchResourceType) soap.HasFault {
	return &pbmmethods.PbmFetchResourceTypeBody{Res: &pbmtypes.PbmFetchResourceTypeResponse{Returnval: []pbmtypes.PbmProfileResourceType{{ResourceType: "STORAGE"}}}}
}

func (m *profileManager) PbmQueryProfile(r *pbmtypes.PbmQueryProfile) soap.HasFault {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	res := &pbmtypes.PbmQueryProfileResponse{}
	requirement := r.ProfileCategory == "" || r.ProfileCategory == string(pbmtypes.PbmProfileCategoryEnumREQUIREMENT)
	if r.ResourceType.ResourceType == "STORAGE" && requirement {
		for _, id := range m.s.policyIDs() {
			res.Returnval = append(res.Returnval, pbmtypes.PbmProfileId{UniqueId: id})
		}
	}
	return &pbmmethods.PbmQueryProfileBody{Res: res}
}

func (m *profileManager) PbmRetrieveContent(r *pbmtypes.PbmRetrieveContent) soap.HasFault {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	res := &pbmtypes.PbmRetrieveContentResponse{}
	for _, id := range r.ProfileIds {
		p, ok := m.s.policies[id.UniqueId]
		if !ok || p.Gone {
			return refuse(&types.InvalidArgument{RuntimeFault: reason("there is no storage policy " + id.UniqueId), InvalidProperty: "profileId"})
		}
		res.Returnval = append(res.Returnval, p.profile(id.UniqueId))
	}
	if len(res.Returnval) == 0 {
		return refuse(&types.InvalidArgument{InvalidProperty: "profileIds"})
	}
	return &pbmmethods.PbmRetrieveContentBody{Res: res}
}

func (p policyRecord) profile(id string) *pbmtypes.PbmCapabilityProfile {
	rules := decodeRules(p.Rules)
	if rules == nil {
		rules = &pbmtypes.PbmCapabilitySubProfileConstraints{}
	}
	return &pbmtypes.PbmCapabilityProfile{
		PbmProfile: pbmtypes.PbmProfile{
			ProfileId: pbmtypes.PbmProfileId{UniqueId: id}, Name: p.Name, Description: p.Description,
			CreationTime: p.Created, CreatedBy: p.CreatedBy, LastUpdatedTime: p.Changed, LastUpdatedBy: p.ChangedBy,
		},
		ProfileCategory: string(pbmtypes.PbmProfileCategoryEnumREQUIREMENT),
		ResourceType:    pbmtypes.PbmProfileResourceType{ResourceType: "STORAGE"},
		Constraints:     rules,
	}
}

func encodeRules(rules pbmtypes.BasePbmCapabilityConstraints) string {
	if rules == nil {
		return ""
	}
	// A type that has them, so that the XML knows theirs.
	b, err := xml.Marshal(pbmtypes.PbmCapabilityProfileUpdateSpec{Constraints: rules})
	if err != nil {
		return ""
	}
	return string(b)
}

func decodeRules(text string) pbmtypes.BasePbmCapabilityConstraints {
	if text == "" {
		return nil
	}
	var spec pbmtypes.PbmCapabilityProfileUpdateSpec
	d := xml.NewDecoder(bytes.NewReader([]byte(text)))
	known := types.TypeFunc()
	d.TypeFunc = func(name string) (reflect.Type, bool) {
		if t, ok := known(pbm.Namespace + ":" + name); ok {
			return t, ok
		}
		return known(name)
	}
	if d.Decode(&spec) != nil {
		return nil
	}
	return spec.Constraints
}

// named finds a policy by name, other than except.
func (s *Server) policyNamed(name, except string) bool {
	return slices.ContainsFunc(s.policyIDs(), func(id string) bool { return id != except && s.policies[id].Name == name })
}

func (m *profileManager) PbmCreate(ctx *simulator.Context, r *pbmtypes.PbmCreate) soap.HasFault {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	if r.CreateSpec.Name == "" || len(r.CreateSpec.Name) > 80 {
		return refuse(&types.InvalidArgument{InvalidProperty: "name"})
	}
	if m.s.policyNamed(r.CreateSpec.Name, "") {
		return refuse(&pbmtypes.PbmDuplicateName{PbmFault: pbmtypes.PbmFault{MethodFault: cause("there is a storage policy of that name")}, Name: r.CreateSpec.Name})
	}
	now, by, id := time.Now(), ctx.Session.UserName, uuid.NewString()
	p := policyRecord{Name: r.CreateSpec.Name, Description: r.CreateSpec.Description, Rules: encodeRules(r.CreateSpec.Constraints), Created: now, CreatedBy: by, Changed: now, ChangedBy: by}
	if err := m.s.setPolicy(id, p); err != nil {
		return refuse(brokenFault(err))
	}
	return &pbmmethods.PbmCreateBody{Res: &pbmtypes.PbmCreateResponse{Returnval: pbmtypes.PbmProfileId{UniqueId: id}}}
}

func (m *profileManager) PbmUpdate(ctx *simulator.Context, r *pbmtypes.PbmUpdate) soap.HasFault {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	p, ok := m.s.policies[r.ProfileId.UniqueId]
	if !ok || p.Gone {
		return refuse(&types.InvalidArgument{InvalidProperty: "profileId"})
	}
	if r.UpdateSpec.Name != "" {
		if m.s.policyNamed(r.UpdateSpec.Name, r.ProfileId.UniqueId) {
			return refuse(&pbmtypes.PbmDuplicateName{Name: r.UpdateSpec.Name})
		}
		p.Name = r.UpdateSpec.Name
	}
	if r.UpdateSpec.Description != "" {
		p.Description = r.UpdateSpec.Description
	}
	if r.UpdateSpec.Constraints != nil {
		p.Rules = encodeRules(r.UpdateSpec.Constraints)
	}
	p.Changed, p.ChangedBy = time.Now(), ctx.Session.UserName
	if err := m.s.setPolicy(r.ProfileId.UniqueId, p); err != nil {
		return refuse(brokenFault(err))
	}
	return &pbmmethods.PbmUpdateBody{Res: &pbmtypes.PbmUpdateResponse{}}
}

func (m *profileManager) PbmDelete(r *pbmtypes.PbmDelete) soap.HasFault {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	res := &pbmtypes.PbmDeleteResponse{}
	for _, id := range r.ProfileId {
		outcome := pbmtypes.PbmProfileOperationOutcome{ProfileId: id}
		p, ok := m.s.policies[id.UniqueId]
		if !ok || p.Gone {
			outcome.Fault = &types.LocalizedMethodFault{Fault: &types.InvalidArgument{InvalidProperty: "profileId"}, LocalizedMessage: "there is no such storage policy"}
		} else if n := len(m.s.disksOf(id.UniqueId)); n > 0 {
			outcome.Fault = localized(&pbmtypes.PbmResourceInUse{PbmFault: pbmtypes.PbmFault{MethodFault: cause(fmt.Sprintf("%d disks have the storage policy", n))}, Type: "profile", Name: p.Name})
		} else {
			p.Gone = true
			if err := m.s.setPolicy(id.UniqueId, p); err != nil {
				return refuse(brokenFault(err))
			}
		}
		res.Returnval = append(res.Returnval, outcome)
	}
	return &pbmmethods.PbmDeleteBody{Res: res}
}

type placementSolver struct {
	types.ManagedObjectReference
	s *Server
}

// fitting are the datastores of a policy, among hubs if there are any. A rule
// that is not about tags fits none: nothing here could tell.
func (s *Server) fitting(id string, hubs []pbmtypes.PbmPlacementHub) (fit []pbmtypes.PbmPlacementHub, fault types.BaseMethodFault) {
	p, ok := s.policies[id]
	if !ok || p.Gone {
		return nil, &types.InvalidArgument{RuntimeFault: reason("there is no storage policy " + id), InvalidProperty: "profile"}
	}
	for _, name := range sortedKeys(s.inventory.stores) {
		ref := s.inventory.stores[name]
		hub := pbmtypes.PbmPlacementHub{HubType: ref.Type, HubId: ref.Value}
		asked := len(hubs) == 0 || slices.ContainsFunc(hubs, func(h pbmtypes.PbmPlacementHub) bool { return h.HubType == hub.HubType && h.HubId == hub.HubId })
		if asked && (p.Datastores == nil || slices.Contains(p.Datastores, name)) && (p.Rules == "" || s.meets(ref, decodeRules(p.Rules))) {
			fit = append(fit, hub)
		}
	}
	return fit, nil
}

// meets tells whether a datastore has the tags of one of the rule sets.
func (s *Server) meets(ref types.ManagedObjectReference, rules pbmtypes.BasePbmCapabilityConstraints) bool {
	sets, ok := rules.(*pbmtypes.PbmCapabilitySubProfileConstraints)
	if !ok || len(sets.SubProfiles) == 0 {
		return ok
	}
	return slices.ContainsFunc(sets.SubProfiles, func(set pbmtypes.PbmCapabilitySubProfile) bool {
		return !slices.ContainsFunc(set.Capability, func(c pbmtypes.PbmCapabilityInstance) bool {
			return c.Id.Namespace != tagRules || !s.tagged(ref, c.Id.Id, c)
		})
	})
}

// tagged tells whether an object has a tag of the category that a rule names.
func (s *Server) tagged(ref types.ManagedObjectReference, category string, c pbmtypes.PbmCapabilityInstance) bool {
	for _, constraint := range c.Constraint {
		for _, p := range constraint.PropertyInstance {
			set, ok := p.Value.(pbmtypes.PbmCapabilityDiscreteSet)
			if !ok || !slices.ContainsFunc(set.Values, func(v types.AnyType) bool {
				name, _ := v.(string)
				return s.tags.has(ref, category, name)
			}) {
				return false
			}
		}
	}
	return true
}

func (m *placementSolver) PbmCheckCompatibility(r *pbmtypes.PbmCheckCompatibility) soap.HasFault {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	fit, fault := m.s.fitting(r.Profile.UniqueId, r.HubsToSearch)
	if fault != nil {
		return refuse(fault)
	}
	return &pbmmethods.PbmCheckCompatibilityBody{Res: &pbmtypes.PbmCheckCompatibilityResponse{Returnval: compatible(fit)}}
}

func compatible(fit []pbmtypes.PbmPlacementHub) (all []pbmtypes.PbmPlacementCompatibilityResult) {
	for _, hub := range fit {
		all = append(all, pbmtypes.PbmPlacementCompatibilityResult{Hub: hub})
	}
	return all
}

func (m *placementSolver) PbmQueryMatchingHub(r *pbmtypes.PbmQueryMatchingHub) soap.HasFault {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	fit, fault := m.s.fitting(r.Profile.UniqueId, r.HubsToSearch)
	if fault != nil {
		return refuse(fault)
	}
	return &pbmmethods.PbmQueryMatchingHubBody{Res: &pbmtypes.PbmQueryMatchingHubResponse{Returnval: fit}}
}

func (m *placementSolver) PbmCheckRequirements(r *pbmtypes.PbmCheckRequirements) soap.HasFault {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	var fit []pbmtypes.PbmPlacementHub
	for i, req := range r.PlacementSubjectRequirement {
		p, ok := req.(*pbmtypes.PbmPlacementCapabilityProfileRequirement)
		if !ok {
			return refuse(&types.NotSupported{RuntimeFault: reason("requirements are storage policies")})
		}
		hubs := r.HubsToSearch
		if i > 0 {
			if hubs = fit; len(hubs) == 0 {
				break
			}
		}
		var fault types.BaseMethodFault
		if fit, fault = m.s.fitting(p.ProfileId.UniqueId, hubs); fault != nil {
			return refuse(fault)
		}
	}
	return &pbmmethods.PbmCheckRequirementsBody{Res: &pbmtypes.PbmCheckRequirementsResponse{Returnval: compatible(fit)}}
}
