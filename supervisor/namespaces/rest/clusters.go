package rest

import (
	"context"
	"net/netip"
	"path"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// networkProvider is which of vSphere's two kinds Atoll is closest to: not NSX.
const networkProvider = "VSPHERE_NETWORK"

// capacity is Clusters.Stats and Supervisors.Summary.Stats, in MHz and MiB.
type capacity struct {
	CPUUsed         int64 `json:"cpu_used"`
	CPUCapacity     int64 `json:"cpu_capacity"`
	MemoryUsed      int64 `json:"memory_used"`
	MemoryCapacity  int64 `json:"memory_capacity"`
	StorageUsed     int64 `json:"storage_used"`
	StorageCapacity int64 `json:"storage_capacity"`
}

type clusterSummary struct {
	Cluster          string   `json:"cluster"`
	Name             string   `json:"cluster_name"`
	Stats            capacity `json:"stats"`
	ConfigStatus     string   `json:"config_status"`
	KubernetesStatus string   `json:"kubernetes_status"`
}

// clusterInfo is Clusters.Info, of whose optional fields it has those that mean
// something here.
type clusterInfo struct {
	Stats              capacity          `json:"stat_summary"`
	ConfigStatus       string            `json:"config_status"`
	Messages           []instanceMessage `json:"messages"`
	KubernetesStatus   string            `json:"kubernetes_status"`
	KubernetesMessages []instanceMessage `json:"kubernetes_status_messages"`
	ManagementEndpoint string            `json:"api_server_management_endpoint"`
	ClusterEndpoint    string            `json:"api_server_cluster_endpoint"`
	Servers            []string          `json:"api_servers"`
	Certificate        string            `json:"tls_endpoint_certificate,omitempty"`
	NetworkProvider    string            `json:"network_provider"`
	ServiceCIDR        cidr              `json:"service_cidr"`
}

type cidr struct {
	Address string `json:"address"`
	Prefix  int    `json:"prefix"`
}

func cidrOf(s string) cidr {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return cidr{}
	}
	return cidr{Address: p.Addr().String(), Prefix: p.Bits()}
}

// supervisorStatus is config_status and kubernetes_status of a Supervisor. That
// the API server answers is known: it was read from there.
func supervisorStatus(sv *v1alpha1.Supervisor) (config, kubernetes string) {
	if sv.DeletionTimestamp != nil {
		return statusRemoving, "READY"
	}
	config = conditionStatus(sv.Status.Conditions, sv.Generation, v1alpha1.ConditionReady)
	if c := meta.FindStatusCondition(sv.Status.Conditions, v1alpha1.ConditionConnected); c == nil || c.Status != metav1.ConditionTrue {
		return config, "WARNING"
	}
	return config, "READY"
}

// readable are the zones whose clusters the user may read, and the Supervisor,
// which is nil if there is none.
func (h *Handler) readable(r *call) ([]v1alpha1.ZoneStatus, *v1alpha1.Supervisor, error) {
	sv, err := h.supervisor(r.Context())
	if err == errNoSupervisor {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	var scopes []scope
	for _, z := range sv.Status.Zones {
		scopes = append(scopes, scopeOfZones([]v1alpha1.ZoneStatus{z}))
	}
	granted, err := h.granted(r, privilegeRead, scopes)
	var zones []v1alpha1.ZoneStatus
	for i, ok := range granted {
		if ok {
			zones = append(zones, sv.Status.Zones[i])
		}
	}
	return zones, sv, err
}

// zone is that of the cluster in a call's path, which the user may read.
func (h *Handler) zone(r *call) (v1alpha1.ZoneStatus, *v1alpha1.Supervisor, error) {
	sv, err := h.supervisor(r.Context())
	if err != nil {
		return v1alpha1.ZoneStatus{}, nil, err
	}
	z, err := h.zoneOf(r, sv, r.PathValue("cluster"))
	if err != nil {
		return v1alpha1.ZoneStatus{}, nil, err
	}
	return z, sv, h.require(r, privilegeRead, "to see the cluster", scopeOfZones([]v1alpha1.ZoneStatus{z}))
}

// used is what Kubernetes has of the clusters' use.
type used struct {
	namespaces []v1alpha1.SupervisorNamespace
	policies   policies
}

func (h *Handler) used(ctx context.Context) (used, error) {
	namespaces := &v1alpha1.SupervisorNamespaceList{}
	if err := h.client.List(ctx, namespaces); err != nil {
		return used{}, kubernetesError(err)
	}
	list := &v1alpha1.StoragePolicyList{}
	if err := h.client.List(ctx, list); err != nil {
		return used{}, kubernetesError(err)
	}
	return used{namespaces: namespaces.Items, policies: list.Items}, nil
}

// capacityOf adds up the zones. A namespace with several zones uses an equal
// share of each, as its limits are split. Storage is of the datastores that the
// storage policies may place on: it is shared by all zones.
func capacityOf(sv *v1alpha1.Supervisor, zones []v1alpha1.ZoneStatus, u used) capacity {
	var c capacity
	for _, z := range zones {
		one := clockOf([]v1alpha1.ZoneStatus{z}, nil)
		if z.CPU != nil && one.known() {
			c.CPUCapacity += one.mhz(*z.CPU)
		}
		if z.Memory != nil {
			c.MemoryCapacity += mib(*z.Memory)
		}
	}
	for i := range u.namespaces {
		ns := &u.namespaces[i]
		all := zonesOf(sv, ns.Spec.Zones)
		s := statsOf(ns.Status.Usage, clockOf(sv.Status.Zones, ns.Spec.Zones))
		for _, z := range all {
			for _, counted := range zones {
				if counted.Name == z.Name {
					c.CPUUsed += s.CPU / int64(len(all))
					c.MemoryUsed += s.Memory / int64(len(all))
				}
			}
		}
	}
	seen := map[string]bool{}
	for _, p := range u.policies {
		for _, d := range p.Status.Datastores {
			if !seen[d.ID] {
				seen[d.ID] = true
				c.StorageCapacity += mib(d.Capacity)
				taken := d.Capacity.DeepCopy()
				taken.Sub(d.Free)
				c.StorageUsed += max(0, mib(taken))
			}
		}
	}
	return c
}

// clusterName is the last part of the inventory path, in which vCenter writes a
// slash of a name as %2f; the id while it is not known.
func clusterName(z v1alpha1.ZoneStatus) string {
	if z.Path == "" {
		return z.Cluster
	}
	return strings.NewReplacer("%2f", "/", "%2F", "/", "%5c", `\`, "%25", "%").Replace(path.Base(z.Path))
}

func (h *Handler) listClusters(r *call) (any, error) {
	out := []clusterSummary{}
	zones, sv, err := h.readable(r)
	if err != nil || len(zones) == 0 {
		return out, err
	}
	u, err := h.used(r.Context())
	if err != nil {
		return nil, err
	}
	config, kubernetes := supervisorStatus(sv)
	for _, z := range zones {
		out = append(out, clusterSummary{
			Cluster: z.Cluster, Name: clusterName(z),
			Stats:        capacityOf(sv, []v1alpha1.ZoneStatus{z}, u),
			ConfigStatus: config, KubernetesStatus: kubernetes,
		})
	}
	return out, nil
}

func (h *Handler) getCluster(r *call) (any, error) {
	z, sv, err := h.zone(r)
	if err != nil {
		return nil, err
	}
	u, err := h.used(r.Context())
	if err != nil {
		return nil, err
	}
	config, kubernetes := supervisorStatus(sv)
	return clusterInfo{
		Stats:              capacityOf(sv, []v1alpha1.ZoneStatus{z}, u),
		ConfigStatus:       config,
		Messages:           messagesOf(sv.Status.Conditions, nil),
		KubernetesStatus:   kubernetes,
		KubernetesMessages: []instanceMessage{},
		ManagementEndpoint: h.cluster.Endpoint,
		ClusterEndpoint:    h.cluster.Endpoint,
		Servers:            []string{h.cluster.Endpoint},
		Certificate:        string(h.cluster.CA),
		NetworkProvider:    networkProvider,
		ServiceCIDR:        cidrOf(h.cluster.Services),
	}, nil
}

func (h *Handler) resourceOptions(r *call) (any, error) {
	if _, _, err := h.zone(r); err != nil {
		return nil, err
	}
	return struct {
		Create string `json:"create_resource_quota_type"`
		Update string `json:"update_resource_quota_type"`
	}{"ResourceQuotaOptionsV1", "ResourceQuotaOptionsV1Update"}, nil
}

type compatibility struct {
	Cluster    string    `json:"cluster"`
	Compatible bool      `json:"compatible"`
	Reasons    []message `json:"incompatibility_reasons"`
}

// clusterCompatibility tells of the Supervisor's clusters: whether others could
// be is not known before they are added.
func (h *Handler) clusterCompatibility(r *call) (any, error) {
	query := r.URL.Query()
	only := query.Get("compatible")
	if _, err := strconv.ParseBool(only); only != "" && err != nil {
		return nil, problemf(errdefs.ErrInvalidArgument, "compatible is true or false, not %q.", only)
	}
	reasons := []message{}
	switch provider := query.Get("network_provider"); provider {
	case "", networkProvider:
	case "NSXT_CONTAINER_PLUGIN", "NSX_VPC":
		reasons = append(reasons, messageOf("NetworkProvider", "Atoll does not use NSX."))
	default:
		return nil, problemf(errdefs.ErrInvalidArgument, "%q is no network provider.", provider)
	}
	zones, _, err := h.readable(r)
	out := []compatibility{}
	for _, z := range zones {
		fits := len(reasons) == 0
		if want, err := strconv.ParseBool(only); err != nil || !want || fits {
			out = append(out, compatibility{Cluster: z.Cluster, Compatible: fits, Reasons: reasons})
		}
	}
	return out, err
}

type supervisorInfo struct {
	Name             string              `json:"name"`
	Endpoint         string              `json:"apiendpoint,omitempty"`
	Stats            capacity            `json:"stats"`
	ConfigStatus     string              `json:"config_status"`
	KubernetesStatus string              `json:"kubernetes_status"`
	Messages         []supervisorMessage `json:"messages"`
}

type supervisorMessage struct {
	ID string `json:"id"`
	instanceMessage
}

func (h *Handler) supervisorInfo(r *call, sv *v1alpha1.Supervisor) (supervisorInfo, error) {
	u, err := h.used(r.Context())
	if err != nil {
		return supervisorInfo{}, err
	}
	info := supervisorInfo{Name: sv.Name, Endpoint: h.cluster.Endpoint, Stats: capacityOf(sv, sv.Status.Zones, u), Messages: []supervisorMessage{}}
	info.ConfigStatus, info.KubernetesStatus = supervisorStatus(sv)
	for _, m := range messagesOf(sv.Status.Conditions, nil) {
		info.Messages = append(info.Messages, supervisorMessage{ID: m.Details.ID, instanceMessage: m})
	}
	return info, nil
}

type supervisorItem struct {
	Supervisor string         `json:"supervisor"`
	Info       supervisorInfo `json:"info"`
}

func (h *Handler) supervisorSummaries(r *call) (any, error) {
	out := struct {
		Items []supervisorItem `json:"items"`
	}{Items: []supervisorItem{}}
	sv, err := h.supervisor(r.Context())
	if err == errNoSupervisor {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	err = h.require(r, privilegeRead, "to see the Supervisor", scopeOfZones(sv.Status.Zones))
	if errdefs.IsPermissionDenied(err) {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	info, err := h.supervisorInfo(r, sv)
	if err != nil {
		return nil, err
	}
	out.Items = append(out.Items, supervisorItem{Supervisor: sv.Name, Info: info})
	return out, nil
}

// supervisorRead is the Supervisor in a call's path, which the user may read.
func (h *Handler) supervisorRead(r *call) (*v1alpha1.Supervisor, error) {
	sv, err := h.supervisorNamed(r.Context(), r.PathValue("supervisor"))
	if err != nil {
		return nil, err
	}
	return sv, h.require(r, privilegeRead, "to see the Supervisor", scopeOfZones(sv.Status.Zones))
}

func (h *Handler) supervisorSummary(r *call) (any, error) {
	sv, err := h.supervisorRead(r)
	if err != nil {
		return nil, err
	}
	return h.supervisorInfo(r, sv)
}

type topology struct {
	Zone     string   `json:"zone"`
	Clusters []string `json:"clusters"`
}

func (h *Handler) supervisorTopology(r *call) (any, error) {
	sv, err := h.supervisorRead(r)
	if err != nil {
		return nil, err
	}
	out := []topology{}
	for _, z := range sv.Status.Zones {
		out = append(out, topology{Zone: z.Name, Clusters: []string{z.Cluster}})
	}
	return out, nil
}

// software is software.Clusters.Summary, and without the cluster its Info.
type software struct {
	Cluster   string            `json:"cluster,omitempty"`
	Name      string            `json:"cluster_name,omitempty"`
	Current   string            `json:"current_version"`
	Available []string          `json:"available_versions"`
	State     string            `json:"state"`
	Messages  []instanceMessage `json:"messages"`
}

func (h *Handler) listSoftware(r *call) (any, error) {
	zones, _, err := h.readable(r)
	out := []software{}
	for _, z := range zones {
		out = append(out, software{Cluster: z.Cluster, Name: clusterName(z), Current: h.cluster.Version, Available: []string{}, State: "READY", Messages: []instanceMessage{}})
	}
	return out, err
}

func (h *Handler) getSoftware(r *call) (any, error) {
	if _, _, err := h.zone(r); err != nil {
		return nil, err
	}
	return software{Current: h.cluster.Version, Available: []string{}, State: "READY", Messages: []instanceMessage{}}, nil
}

// availableVersions: there is nothing to upgrade to from here.
func (h *Handler) availableVersions(*call) (any, error) { return []struct{}{}, nil }

// listServices: there are none.
func (h *Handler) listServices(*call) (any, error) { return []struct{}{}, nil }
