package vcsim

import (
	"slices"
	"time"

	pbmmethods "github.com/vmware/govmomi/pbm/methods"
	pbmtypes "github.com/vmware/govmomi/pbm/types"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// Which disks storage policies are on, and whether they are kept: a disk is
// compliant where its datastore still fits.

type complianceManager struct {
	types.ManagedObjectReference
	s *Server
}

// fitsPolicy tells whether a datastore is compatible with a policy.
func (s *Server) fitsPolicy(policy string, datastore types.ManagedObjectReference) bool {
	fit, fault := s.fitting(policy, []pbmtypes.PbmPlacementHub{{HubType: datastore.Type, HubId: datastore.Value}})
	return fault == nil && len(fit) > 0
}

func (s *Server) complianceOf(d *diskRecord) string {
	p, ok := s.policies[d.Policy]
	switch {
	case d.Policy == "":
		return string(pbmtypes.PbmComplianceStatusNotApplicable)
	case !ok || p.Gone:
		return string(pbmtypes.PbmComplianceStatusUnknown)
	case s.fitsPolicy(d.Policy, s.inventory.stores[d.Datastore]):
		return string(pbmtypes.PbmComplianceStatusCompliant)
	}
	return string(pbmtypes.PbmComplianceStatusNonCompliant)
}

// entityDisk is the disk that PBM calls an entity.
func (s *Server) entityDisk(e pbmtypes.PbmServerObjectRef) (*diskRecord, types.BaseMethodFault) {
	if e.ObjectType != string(pbmtypes.PbmObjectTypeVirtualDiskUUID) {
		return nil, &types.NotSupported{RuntimeFault: reason("policies are on First Class Disks alone here")}
	}
	return s.disk(e.Key)
}

func (s *Server) complianceResults(entities []pbmtypes.PbmServerObjectRef) (all []pbmtypes.PbmComplianceResult, fault types.BaseMethodFault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range entities {
		d, fault := s.entityDisk(e)
		if fault != nil {
			return nil, fault
		}
		r := pbmtypes.PbmComplianceResult{CheckTime: time.Now(), Entity: e, ComplianceTaskStatus: "success", ComplianceStatus: s.complianceOf(d)}
		if d.Policy != "" {
			r.Profile = &pbmtypes.PbmProfileId{UniqueId: d.Policy}
		}
		all = append(all, r)
	}
	return all, nil
}

func (m *complianceManager) PbmCheckCompliance(r *pbmtypes.PbmCheckCompliance) soap.HasFault {
	all, fault := m.s.complianceResults(r.Entities)
	if fault != nil {
		return refuse(fault)
	}
	return &pbmmethods.PbmCheckComplianceBody{Res: &pbmtypes.PbmCheckComplianceResponse{Returnval: all}}
}

func (m *complianceManager) PbmFetchComplianceResult(r *pbmtypes.PbmFetchComplianceResult) soap.HasFault {
	all, fault := m.s.complianceResults(r.Entities)
	if fault != nil {
		return refuse(fault)
	}
	return &pbmmethods.PbmFetchComplianceResultBody{Res: &pbmtypes.PbmFetchComplianceResultResponse{Returnval: all}}
}

func (s *Server) disksOf(policy string) (all []pbmtypes.PbmServerObjectRef) {
	for _, id := range sortedKeys(s.disks) {
		if s.disks[id].Policy == policy {
			all = append(all, pbmtypes.PbmServerObjectRef{ObjectType: string(pbmtypes.PbmObjectTypeVirtualDiskUUID), Key: id, ServerUuid: s.instanceUUID})
		}
	}
	return all
}

func (m *profileManager) PbmQueryAssociatedEntity(r *pbmtypes.PbmQueryAssociatedEntity) soap.HasFault {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	res := &pbmtypes.PbmQueryAssociatedEntityResponse{Returnval: m.s.disksOf(r.Profile.UniqueId)}
	if r.EntityType != "" {
		res.Returnval = slices.DeleteFunc(res.Returnval, func(e pbmtypes.PbmServerObjectRef) bool { return e.ObjectType != r.EntityType })
	}
	return &pbmmethods.PbmQueryAssociatedEntityBody{Res: res}
}

func (m *profileManager) PbmQueryAssociatedProfile(r *pbmtypes.PbmQueryAssociatedProfile) soap.HasFault {
	m.s.mu.Lock()
	defer m.s.mu.Unlock()
	d, fault := m.s.entityDisk(r.Entity)
	if fault != nil {
		return refuse(fault)
	}
	res := &pbmtypes.PbmQueryAssociatedProfileResponse{}
	if d.Policy != "" {
		res.Returnval = []pbmtypes.PbmProfileId{{UniqueId: d.Policy}}
	}
	return &pbmmethods.PbmQueryAssociatedProfileBody{Res: res}
}
