package rest

import "net/http"

// A Route is one call that is served: the table in docs/namespaces-rest.md is
// held against the list of them.
type Route struct {
	Method string
	Path   string // as net/http has patterns
	// Privilege of vSphere that the user needs, and where: "Namespaces.Configure
	// on the cluster". Empty: a session is enough.
	Privilege string
	// Object is what of Kubernetes the call reads or writes; empty: nothing.
	Object string
	// Unsupported is the answer to a call that vSphere has and Atoll has nothing
	// for: the reason and the alternative.
	Unsupported string

	actions []string // values of ?action= that it takes, beside none
	do      func(*Handler, *call) (any, error)
}

func (r Route) String() string { return r.Method + " " + r.Path }

// Routes returns what a Handler serves, in the order of the documentation.
func Routes() []Route { return append([]Route(nil), routes...) }

const (
	onNamespace = " on the namespace's pools"
	onCluster   = " on the cluster"
	onClusters  = " on the clusters"
	onRoot      = " on the root folder"

	objNamespace  = "SupervisorNamespace"
	objSupervisor = "Supervisor"
	objClass      = "VirtualMachineClass"
	objPolicy     = "StoragePolicy"
	objTemplate   = "NamespaceTemplate"

	instances  = "/api/vcenter/namespaces/instances"
	management = "/api/vcenter/namespace-management"

	selfServicePath = "/api/vcenter/namespaces/namespace-self-service"
	templatesPath   = "/api/vcenter/namespaces/namespace-templates"
)

var routes = []Route{
	{Method: http.MethodGet, Path: instances, Privilege: privilegeRead + onNamespace + " (others are left out)", Object: objNamespace, do: (*Handler).listInstances},
	{Method: http.MethodPost, Path: instances, Privilege: privilegeConfigure + onCluster, Object: objNamespace, do: (*Handler).createInstance},
	{Method: http.MethodGet, Path: instances + "/{namespace}", Privilege: privilegeRead + onNamespace, Object: objNamespace, do: (*Handler).getInstance},
	{Method: http.MethodPut, Path: instances + "/{namespace}", Privilege: privilegeConfigure + onNamespace, Object: objNamespace, do: (*Handler).setInstance},
	{Method: http.MethodPatch, Path: instances + "/{namespace}", Privilege: privilegeConfigure + onNamespace, Object: objNamespace, do: (*Handler).updateInstance},
	{Method: http.MethodDelete, Path: instances + "/{namespace}", Privilege: privilegeConfigure + onNamespace, Object: objNamespace, do: (*Handler).deleteInstance},
	{Method: http.MethodGet, Path: instances + "/v2", Privilege: privilegeRead + onNamespace + " (others are left out)", Object: objNamespace, do: (*Handler).listInstancesV2},
	{Method: http.MethodPost, Path: instances + "/v2", Privilege: privilegeConfigure + onClusters, Object: objNamespace, do: (*Handler).createInstanceV2},
	{Method: http.MethodGet, Path: instances + "/v2/{namespace}", Privilege: privilegeRead + onNamespace, Object: objNamespace, do: (*Handler).getInstanceV2},

	{Method: http.MethodGet, Path: instances + "/{namespace}/access/{domain}/{subject}", Privilege: privilegeRead + onNamespace, Object: objNamespace, do: (*Handler).getAccess},
	{Method: http.MethodPost, Path: instances + "/{namespace}/access/{domain}/{subject}", Privilege: privilegeConfigure + onNamespace, Object: objNamespace, do: (*Handler).createAccess},
	{Method: http.MethodPut, Path: instances + "/{namespace}/access/{domain}/{subject}", Privilege: privilegeConfigure + onNamespace, Object: objNamespace, do: (*Handler).setAccess},
	{Method: http.MethodDelete, Path: instances + "/{namespace}/access/{domain}/{subject}", Privilege: privilegeConfigure + onNamespace, Object: objNamespace, do: (*Handler).deleteAccess},
	{Method: http.MethodPost, Path: instances + "/{namespace}/registervm", Unsupported: "Registering a VM is not supported: Atoll runs pods, and makes their VMs itself."},
	{Method: http.MethodGet, Path: "/api/vcenter/namespaces-user/namespaces", Privilege: privilegeRead + onNamespace + " (others are left out)", Object: objNamespace, do: (*Handler).listUserNamespaces},

	{Method: http.MethodGet, Path: selfServicePath, Privilege: privilegeRead + onCluster + " (others are left out)", Object: objTemplate, do: (*Handler).listSelfService},
	{Method: http.MethodGet, Path: selfServicePath + "/{cluster}", Privilege: privilegeRead + onCluster, Object: objTemplate, do: (*Handler).getSelfService},
	{Method: http.MethodPost, Path: selfServicePath + "/{cluster}", Privilege: privilegeSelfService + onClusters, Object: objTemplate, actions: []string{"activate", "activateWithTemplate", "deactivate"}, do: (*Handler).changeSelfService},
	{Method: http.MethodGet, Path: templatesPath + "/clusters/{cluster}", Privilege: privilegeRead + onCluster, Object: objTemplate, do: (*Handler).listTemplates},
	{Method: http.MethodPost, Path: templatesPath + "/clusters/{cluster}", Privilege: privilegeSelfService + onClusters, Object: objTemplate, do: (*Handler).postTemplate},
	{Method: http.MethodGet, Path: templatesPath + "/clusters/{cluster}/{template}", Privilege: privilegeRead + onCluster, Object: objTemplate, do: (*Handler).getTemplate},
	{Method: http.MethodPatch, Path: templatesPath + "/clusters/{cluster}/{template}", Privilege: privilegeSelfService + onClusters, Object: objTemplate, do: (*Handler).patchTemplate},
	{Method: http.MethodGet, Path: templatesPath + "/supervisors/{supervisor}", Privilege: privilegeRead + onClusters, Object: objTemplate, do: (*Handler).listTemplates},
	{Method: http.MethodPost, Path: templatesPath + "/supervisors/{supervisor}", Privilege: privilegeSelfService + onClusters, Object: objTemplate, do: (*Handler).postTemplate},
	{Method: http.MethodGet, Path: templatesPath + "/supervisors/{supervisor}/{template}", Privilege: privilegeRead + onClusters, Object: objTemplate, do: (*Handler).getTemplate},
	{Method: http.MethodPatch, Path: templatesPath + "/supervisors/{supervisor}/{template}", Privilege: privilegeSelfService + onClusters, Object: objTemplate, do: (*Handler).patchTemplate},

	{Method: http.MethodGet, Path: management + "/virtual-machine-classes", Privilege: privilegeRead + onRoot, Object: objClass, do: (*Handler).listClasses},
	{Method: http.MethodPost, Path: management + "/virtual-machine-classes", Privilege: privilegeClasses + onRoot, Object: objClass, do: (*Handler).createClass},
	{Method: http.MethodGet, Path: management + "/virtual-machine-classes/{class}", Privilege: privilegeRead + onRoot, Object: objClass, do: (*Handler).getClass},
	{Method: http.MethodPatch, Path: management + "/virtual-machine-classes/{class}", Privilege: privilegeClasses + onRoot, Object: objClass, do: (*Handler).updateClass},
	{Method: http.MethodDelete, Path: management + "/virtual-machine-classes/{class}", Privilege: privilegeClasses + onRoot, Object: objClass, do: (*Handler).deleteClass},

	{Method: http.MethodGet, Path: management + "/clusters", Privilege: privilegeRead + onCluster + " (others are left out)", Object: objSupervisor, do: (*Handler).listClusters},
	{Method: http.MethodGet, Path: management + "/clusters/{cluster}", Privilege: privilegeRead + onCluster, Object: objSupervisor, do: (*Handler).getCluster},
	{Method: http.MethodGet, Path: management + "/clusters/{cluster}/workload-resource-options", Privilege: privilegeRead + onCluster, Object: objSupervisor, do: (*Handler).resourceOptions},
	{Method: http.MethodPost, Path: management + "/clusters/{cluster}", actions: []string{"enable", "disable", "rotate_password"}, Unsupported: noEnabling},
	{Method: http.MethodPut, Path: management + "/clusters/{cluster}", Unsupported: noEnabling},
	{Method: http.MethodPatch, Path: management + "/clusters/{cluster}", Unsupported: noEnabling},
	{Method: http.MethodGet, Path: management + "/clusters/{cluster}/networks", Unsupported: noWorkloadNetworks},
	{Method: http.MethodGet, Path: management + "/cluster-compatibility", Privilege: privilegeRead + onCluster + " (others are left out)", Object: objSupervisor, do: (*Handler).clusterCompatibility},
	{Method: http.MethodGet, Path: management + "/distributed-switch-compatibility", Unsupported: noWorkloadNetworks},
	{Method: http.MethodGet, Path: management + "/edge-cluster-compatibility", Unsupported: noWorkloadNetworks},
	{Method: http.MethodGet, Path: management + "/supervisors/summaries", Privilege: privilegeRead + onClusters + " (else the list is empty)", Object: objSupervisor, do: (*Handler).supervisorSummaries},
	{Method: http.MethodGet, Path: management + "/supervisors/{supervisor}/summary", Privilege: privilegeRead + onClusters, Object: objSupervisor, do: (*Handler).supervisorSummary},
	{Method: http.MethodGet, Path: management + "/supervisors/{supervisor}/topology", Privilege: privilegeRead + onClusters, Object: objSupervisor, do: (*Handler).supervisorTopology},
	{Method: http.MethodPost, Path: management + "/supervisors/{supervisor}", actions: []string{"enable_on_compute_cluster", "enable_on_zones"}, Unsupported: noEnabling},
	{Method: http.MethodGet, Path: management + "/software/clusters", Privilege: privilegeRead + onCluster + " (others are left out)", Object: objSupervisor, do: (*Handler).listSoftware},
	{Method: http.MethodGet, Path: management + "/software/clusters/{cluster}", Privilege: privilegeRead + onCluster, Object: objSupervisor, do: (*Handler).getSoftware},
	{Method: http.MethodPost, Path: management + "/software/clusters/{cluster}", actions: []string{"upgrade"}, Unsupported: "An upgrade is not made through vCenter: install the new version of Atoll on the hosts."},
	{Method: http.MethodGet, Path: management + "/software/cluster-available-versions", do: (*Handler).availableVersions},
	{Method: http.MethodGet, Path: management + "/supervisor-services", do: (*Handler).listServices},
	{Method: http.MethodPost, Path: management + "/supervisor-services", Unsupported: "Supervisor services are not supported: install into the cluster with kubectl or helm."},

	{Method: http.MethodGet, Path: "/api/vcenter/storage/policies", Privilege: privilegePolicies + onRoot, Object: objPolicy, do: (*Handler).listPolicies},
	{Method: http.MethodPost, Path: "/api/vcenter/storage/policies/{policy}", Privilege: privilegePolicies + onRoot, Object: objPolicy, actions: []string{"check-compatibility"}, do: (*Handler).checkPolicy},
}

const (
	noEnabling         = "A cluster is not enabled for namespaces through vCenter: add it to the zones of the Supervisor object with kubectl."
	noWorkloadNetworks = "Networks of namespaces are not supported: all pods are on the cluster's own network."
)
