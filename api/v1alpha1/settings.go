package v1alpha1

import "k8s.io/apimachinery/pkg/api/resource"

// NamespaceSettings is what an administrator decides about a namespace, by
// itself or in a template.
//
// +kubebuilder:validation:XValidation:rule="!has(self.containerDefaults) || !has(self.containerDefaults.cpuLimit) || !has(self.cpu) || !has(self.cpu.limit) || quantity(string(self.containerDefaults.cpuLimit)).compareTo(quantity(string(self.cpu.limit))) <= 0",message="containerDefaults.cpuLimit is above the namespace's cpu.limit, so that no container could start: lower it"
// +kubebuilder:validation:XValidation:rule="!has(self.containerDefaults) || !has(self.containerDefaults.memoryLimit) || !has(self.memory) || !has(self.memory.limit) || quantity(string(self.containerDefaults.memoryLimit)).compareTo(quantity(string(self.memory.limit))) <= 0",message="containerDefaults.memoryLimit is above the namespace's memory.limit, so that no container could start: lower it"
type NamespaceSettings struct {
	// Description for people; the pool's and the folder's custom attribute in
	// vSphere.
	//
	// Example: shop, team of Ada, cost centre 7
	//
	// +kubebuilder:validation:MaxLength=1024
	// +optional
	Description string `json:"description,omitempty"`
	// CPU of all pods of the namespace together, in cores.
	//
	// Example: {limit: "8", reservation: "2"}
	//
	// +optional
	CPU *CPUAllocation `json:"cpu,omitempty"`
	// Memory of all pods of the namespace together, in bytes.
	//
	// Example: {limit: 16Gi, reservation: 4Gi}
	//
	// +optional
	Memory *MemoryAllocation `json:"memory,omitempty"`
	// ContainerDefaults are the requests and limits of containers that set none.
	// Where the namespace has a limit, containers need one: without defaults
	// those that set none are refused.
	//
	// +optional
	ContainerDefaults *ContainerDefaults `json:"containerDefaults,omitempty"`
	// StoragePolicies that volumes may use, each by a StorageClass of the
	// policy's name.
	//
	// Example: [{name: vsan-default-storage-policy, limit: 100Gi}]
	//
	// +kubebuilder:validation:MaxItems=30
	// +listType=map
	// +listMapKey=name
	// +optional
	StoragePolicies []StoragePolicyLimit `json:"storagePolicies,omitempty"`
	// ObjectCounts limit how many objects of a kind there may be.
	//
	// Example: {pods: 50, services: 10}
	//
	// +optional
	ObjectCounts *ObjectCounts `json:"objectCounts,omitempty"`
	// Access is who may use the namespace, in Kubernetes and in vSphere.
	//
	// Example: [{kind: Group, name: shop-devs, role: edit}]
	//
	// +kubebuilder:validation:MaxItems=128
	// +listType=map
	// +listMapKey=kind
	// +listMapKey=name
	// +listMapKey=domain
	// +optional
	Access []AccessEntry `json:"access,omitempty"`
	// VMClasses are the VirtualMachineClasses that pods may ask for, by name;
	// empty: pods are sized by their containers alone.
	//
	// Example: [best-effort-small]
	//
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=63
	// +listType=set
	// +optional
	VMClasses []string `json:"vmClasses,omitempty"`
	// Tags of vSphere that the pools and the folder get, as category/name; they
	// must exist. Taking one away here leaves it where it is.
	//
	// Example: [cost-centre/7]
	//
	// +kubebuilder:validation:MaxItems=32
	// +kubebuilder:validation:items:MaxLength=512
	// +kubebuilder:validation:items:Pattern=`^[^/]+/[^/]+$`
	// +listType=set
	// +optional
	Tags []string `json:"tags,omitempty"`
	// Attributes are further custom attributes of the pools, for people; names
	// that start with "atoll." are Atoll's own. Taking one away here leaves it
	// where it is.
	//
	// Example: {owner: ada}
	//
	// +kubebuilder:validation:MaxProperties=32
	// +kubebuilder:validation:XValidation:rule="self.all(k, !k.startsWith('atoll.') && size(k) > 0 && size(k) <= 80 && size(self[k]) <= 1024)",message="names of attributes are 1 to 80 characters and do not start with atoll., values at most 1024: shorten or rename it"
	// +optional
	Attributes map[string]string `json:"attributes,omitempty"`
	// DriftPolicy says who wins when both sides differ.
	//
	// +kubebuilder:default={}
	// +optional
	DriftPolicy DriftPolicy `json:"driftPolicy,omitempty"`
}

// CPUAllocation is in cores, thousandths allowed; one core is the clock of the
// zone's hosts (Supervisor's status, mhzPerCore). Where a namespace has
// several zones, limit and reservation are split evenly over their pools.
//
// +kubebuilder:validation:XValidation:rule="!has(self.limit) || quantity(string(self.limit)).compareTo(quantity('1m')) >= 0",message="cpu.limit must be at least 1m: leave it out for no limit"
// +kubebuilder:validation:XValidation:rule="!has(self.reservation) || quantity(string(self.reservation)).compareTo(quantity('0')) >= 0",message="cpu.reservation must not be negative: leave it out for none"
// +kubebuilder:validation:XValidation:rule="!has(self.limit) || !has(self.reservation) || quantity(string(self.reservation)).compareTo(quantity(string(self.limit))) <= 0",message="cpu.reservation is above cpu.limit: lower it, or raise the limit"
type CPUAllocation struct {
	// Limit; without one the pool is unlimited, and so is the quota.
	//
	// Example: "8" or 500m
	//
	// +optional
	Limit *resource.Quantity `json:"limit,omitempty"`
	// Reservation is guaranteed to the pool; it may grow by what the parent pool
	// has left (expandable).
	//
	// Example: "2"
	//
	// +optional
	Reservation *resource.Quantity `json:"reservation,omitempty"`
	// Shares against sibling pools when the hosts are busy.
	//
	// +optional
	Shares *Shares `json:"shares,omitempty"`
}

// MemoryAllocation is in bytes, rounded to MiB as vSphere counts: limits up,
// so that what Kubernetes allows fits. See CPUAllocation.
//
// +kubebuilder:validation:XValidation:rule="!has(self.limit) || quantity(string(self.limit)).compareTo(quantity('1Mi')) >= 0",message="memory.limit must be at least 1Mi: leave it out for no limit"
// +kubebuilder:validation:XValidation:rule="!has(self.reservation) || quantity(string(self.reservation)).compareTo(quantity('0')) >= 0",message="memory.reservation must not be negative: leave it out for none"
// +kubebuilder:validation:XValidation:rule="!has(self.limit) || !has(self.reservation) || quantity(string(self.reservation)).compareTo(quantity(string(self.limit))) <= 0",message="memory.reservation is above memory.limit: lower it, or raise the limit"
type MemoryAllocation struct {
	// Limit; without one the pool is unlimited, and so is the quota.
	//
	// Example: 16Gi
	//
	// +optional
	Limit *resource.Quantity `json:"limit,omitempty"`
	// Reservation is guaranteed to the pool; it may grow by what the parent pool
	// has left (expandable).
	//
	// Example: 4Gi
	//
	// +optional
	Reservation *resource.Quantity `json:"reservation,omitempty"`
	// Shares against sibling pools when the hosts are short.
	//
	// +optional
	Shares *Shares `json:"shares,omitempty"`
}

// Shares are vSphere's: a level, or a number with the level custom.
//
// +kubebuilder:validation:XValidation:rule="(self.level == 'custom') == has(self.value)",message="give value with level custom, and only then"
type Shares struct {
	// +kubebuilder:validation:Enum=low;normal;high;custom
	// +kubebuilder:default=normal
	// +optional
	Level SharesLevel `json:"level,omitempty"`
	// Value of level custom. Example: 6000
	//
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=4000000
	// +optional
	Value *int32 `json:"value,omitempty"`
}

// SharesLevel is low, normal, high or custom.
type SharesLevel string

// Values of SharesLevel.
const (
	SharesLow    SharesLevel = "low"
	SharesNormal SharesLevel = "normal"
	SharesHigh   SharesLevel = "high"
	SharesCustom SharesLevel = "custom"
)

// ContainerDefaults become a LimitRange.
//
// +kubebuilder:validation:XValidation:rule="!has(self.cpuRequest) || !has(self.cpuLimit) || quantity(string(self.cpuRequest)).compareTo(quantity(string(self.cpuLimit))) <= 0",message="containerDefaults.cpuRequest is above cpuLimit: lower it, or raise the limit"
// +kubebuilder:validation:XValidation:rule="!has(self.memoryRequest) || !has(self.memoryLimit) || quantity(string(self.memoryRequest)).compareTo(quantity(string(self.memoryLimit))) <= 0",message="containerDefaults.memoryRequest is above memoryLimit: lower it, or raise the limit"
type ContainerDefaults struct {
	// Example: 250m
	//
	// +optional
	CPURequest *resource.Quantity `json:"cpuRequest,omitempty"`
	// Example: 500m
	//
	// +optional
	CPULimit *resource.Quantity `json:"cpuLimit,omitempty"`
	// Example: 256Mi
	//
	// +optional
	MemoryRequest *resource.Quantity `json:"memoryRequest,omitempty"`
	// Example: 512Mi
	//
	// +optional
	MemoryLimit *resource.Quantity `json:"memoryLimit,omitempty"`
}

// StoragePolicyLimit allows one storage policy.
//
// +kubebuilder:validation:XValidation:rule="!has(self.limit) || !string(self.limit).startsWith('-')",message="a storage limit must not be negative: leave it out for none"
type StoragePolicyLimit struct {
	// Name of the StoragePolicy object. `kubectl get storagepolicies` lists them.
	//
	// Example: vsan-default-storage-policy
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Name string `json:"name"`
	// Limit is the sum of all volumes' requests; without one it is unlimited.
	//
	// Example: 100Gi
	//
	// +optional
	Limit *resource.Quantity `json:"limit,omitempty"`
}

// ObjectCounts limit how many objects of a kind there may be; what is left out
// is unlimited.
type ObjectCounts struct {
	// +kubebuilder:validation:Minimum=0
	// +optional
	Pods *int64 `json:"pods,omitempty"`
	// +kubebuilder:validation:Minimum=0
	// +optional
	Services *int64 `json:"services,omitempty"`
	// +kubebuilder:validation:Minimum=0
	// +optional
	ConfigMaps *int64 `json:"configMaps,omitempty"`
	// +kubebuilder:validation:Minimum=0
	// +optional
	Secrets *int64 `json:"secrets,omitempty"`
	// +kubebuilder:validation:Minimum=0
	// +optional
	PersistentVolumeClaims *int64 `json:"persistentVolumeClaims,omitempty"`
	// +kubebuilder:validation:Minimum=0
	// +optional
	ReplicationControllers *int64 `json:"replicationControllers,omitempty"`
	// +kubebuilder:validation:Minimum=0
	// +optional
	Deployments *int64 `json:"deployments,omitempty"`
	// +kubebuilder:validation:Minimum=0
	// +optional
	ReplicaSets *int64 `json:"replicaSets,omitempty"`
	// +kubebuilder:validation:Minimum=0
	// +optional
	StatefulSets *int64 `json:"statefulSets,omitempty"`
	// +kubebuilder:validation:Minimum=0
	// +optional
	DaemonSets *int64 `json:"daemonSets,omitempty"`
	// +kubebuilder:validation:Minimum=0
	// +optional
	Jobs *int64 `json:"jobs,omitempty"`
	// +kubebuilder:validation:Minimum=0
	// +optional
	CronJobs *int64 `json:"cronJobs,omitempty"`
}

// AccessEntry lets a user or group of vSphere SSO into the namespace: by a
// RoleBinding in Kubernetes, by a permission on the pools and the folder in
// vSphere. In Kubernetes the subject's name is sso:name@domain, in lower case.
//
// +kubebuilder:validation:XValidation:rule="self.domain == '-' || !self.name.contains('@') && !self.name.contains('\\\\')",message="name is without the domain: put what follows the @ into domain"
type AccessEntry struct {
	// +kubebuilder:validation:Enum=User;Group
	Kind SubjectKind `json:"kind"`
	// Name without the domain.
	//
	// Example: ada
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
	// Domain of vSphere SSO; "" stands for the Supervisor's ssoDomain, and "-"
	// for a user or group of Kubernetes that vSphere does not know, such as one
	// of a client certificate: it gets no permission there.
	//
	// Example: vsphere.local
	//
	// +kubebuilder:default=""
	// +kubebuilder:validation:MaxLength=253
	// +optional
	Domain string `json:"domain"`
	// Role: view reads; edit also makes, changes and deletes what runs in the
	// namespace, and sees the consoles of its VMs; owner also deletes the
	// namespace, grants these roles in it, and has power over its VMs.
	//
	// +kubebuilder:validation:Enum=owner;edit;view
	Role AccessRole `json:"role"`
}

// SubjectKind is User or Group.
type SubjectKind string

// Values of SubjectKind.
const (
	UserSubject  SubjectKind = "User"
	GroupSubject SubjectKind = "Group"
)

// AccessRole is owner, edit or view.
type AccessRole string

// Values of AccessRole.
const (
	RoleOwner AccessRole = "owner"
	RoleEdit  AccessRole = "edit"
	RoleView  AccessRole = "view"
)

// DriftPolicy says who wins when somebody changed one side. Adopt takes the
// change into the spec, Mend undoes it; either is told by an event on both
// sides. A pool or folder that was deleted is made again by both.
type DriftPolicy struct {
	// Limits are limit, reservation and shares of CPU and memory, changed on the
	// pool. Where a namespace has several zones, the sum of the pools is adopted
	// and shared out evenly again.
	//
	// +kubebuilder:default=Adopt
	// +optional
	Limits DriftAction `json:"limits,omitempty"`
	// Structure is where pools and folder are, what they are called, their
	// permissions and their description. What cannot be part of a spec is mended
	// all the same: name and place of pools and folder.
	//
	// +kubebuilder:default=Mend
	// +optional
	Structure DriftAction `json:"structure,omitempty"`
	// Quota is the ResourceQuotas and the LimitRange, changed by kubectl.
	//
	// +kubebuilder:default=Mend
	// +optional
	Quota DriftAction `json:"quota,omitempty"`
}

// DriftAction is Adopt or Mend.
//
// +kubebuilder:validation:Enum=Adopt;Mend
type DriftAction string

// Values of DriftAction.
const (
	Adopt DriftAction = "Adopt"
	Mend  DriftAction = "Mend"
)
