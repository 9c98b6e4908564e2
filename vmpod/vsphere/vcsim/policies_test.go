package vcsim

import (
	"slices"
	"testing"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/pbm"
	pbmtypes "github.com/vmware/govmomi/pbm/types"
	"github.com/vmware/govmomi/vapi/tags"
	"github.com/vmware/govmomi/vim25/types"
)

// TestPolicies: which datastores fit, and what becomes of a policy of the
// configuration that a user renamed or removed, over a restart.
func TestPolicies(t *testing.T) {
	c := config(t.TempDir())
	c.Datastores = []Datastore{{Name: "fast"}, {Name: "slow"}}
	c.Policies = []Policy{{Name: "all"}, {Name: "quick", Datastores: []string{"fast"}}, {Name: "unwanted"}}
	s := start(t, c)
	client := signIn(t, s, admin)
	p := must[*pbm.Client](t)(pbm.NewClient(t.Context(), client.Client))
	m := tagManager(t, s, client)
	category := must[string](t)(m.CreateCategory(t.Context(), &tags.Category{Name: "tier", Cardinality: "SINGLE"}))
	tag := must[string](t)(m.CreateTag(t.Context(), &tags.Tag{Name: "one", CategoryID: category}))
	if err := m.AttachTag(t.Context(), tag, s.inventory.stores["slow"]); err != nil {
		t.Fatal(err)
	}
	rule := func(namespace string) *pbmtypes.PbmCapabilitySubProfileConstraints {
		return &pbmtypes.PbmCapabilitySubProfileConstraints{SubProfiles: []pbmtypes.PbmCapabilitySubProfile{{Name: "set", Capability: []pbmtypes.PbmCapabilityInstance{{
			Id: pbmtypes.PbmCapabilityMetadataUniqueId{Namespace: namespace, Id: "tier"},
			Constraint: []pbmtypes.PbmCapabilityConstraintInstance{{PropertyInstance: []pbmtypes.PbmCapabilityPropertyInstance{{
				Id: "tier", Value: pbmtypes.PbmCapabilityDiscreteSet{Values: []types.AnyType{"one"}},
			}}}},
		}}}}}
	}
	for name, constraints := range map[string]*pbmtypes.PbmCapabilitySubProfileConstraints{"tagged": rule(tagRules), "vsan": rule("VSAN")} {
		must[*pbmtypes.PbmProfileId](t)(p.CreateProfile(t.Context(), pbmtypes.PbmCapabilityProfileCreateSpec{Name: name, ResourceType: pbmtypes.PbmProfileResourceType{ResourceType: "STORAGE"}, Constraints: constraints}))
	}
	fits(t, s, p, map[string][]string{"all": {"fast", "slow"}, "quick": {"fast"}, "unwanted": {"fast", "slow"}, "tagged": {"slow"}, "vsan": {}})
	id := func(name string) pbmtypes.PbmProfileId {
		return pbmtypes.PbmProfileId{UniqueId: must[string](t)(p.ProfileIDByName(t.Context(), name))}
	}
	if err := p.UpdateProfile(t.Context(), id("quick"), pbmtypes.PbmCapabilityProfileUpdateSpec{Name: "renamed"}); err != nil {
		t.Fatal(err)
	}
	if err := p.UpdateProfile(t.Context(), id("tagged"), pbmtypes.PbmCapabilityProfileUpdateSpec{Name: "all"}); !fault.Is(err, &pbmtypes.PbmDuplicateName{}) {
		t.Errorf("a name twice: %v", err)
	}
	must[[]pbmtypes.PbmProfileOperationOutcome](t)(p.DeleteProfile(t.Context(), []pbmtypes.PbmProfileId{id("unwanted")}))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = start(t, c)
	p = must[*pbm.Client](t)(pbm.NewClient(t.Context(), signIn(t, s, admin).Client))
	fits(t, s, p, map[string][]string{"all": {"fast", "slow"}, "renamed": {"fast"}, "tagged": {"slow"}, "vsan": {}})
}

// fits compares policies and the datastores that they fit, by name.
func fits(t *testing.T, s *Server, p *pbm.Client, want map[string][]string) {
	t.Helper()
	ids := must[[]pbmtypes.PbmProfileId](t)(p.QueryProfile(t.Context(), pbmtypes.PbmProfileResourceType{ResourceType: "STORAGE"}, ""))
	profiles := must[[]pbmtypes.BasePbmProfile](t)(p.RetrieveContent(t.Context(), ids))
	if len(profiles) != len(want) {
		t.Errorf("%d policies, want %d", len(profiles), len(want))
	}
	for _, x := range profiles {
		profile := x.GetPbmProfile()
		result := must[pbm.PlacementCompatibilityResult](t)(p.CheckRequirements(t.Context(), nil, nil, []pbmtypes.BasePbmPlacementRequirement{
			&pbmtypes.PbmPlacementCapabilityProfileRequirement{ProfileId: profile.ProfileId},
		}))
		names := []string{}
		for _, hub := range result.CompatibleDatastores() {
			names = append(names, s.nameOf(types.ManagedObjectReference{Type: hub.HubType, Value: hub.HubId}))
		}
		slices.Sort(names)
		if !slices.Equal(names, want[profile.Name]) {
			t.Errorf("policy %q fits %v, want %v", profile.Name, names, want[profile.Name])
		}
	}
}
