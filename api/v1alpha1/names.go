package v1alpha1

// LocalDomain in an access list is that of Kubernetes alone: vSphere is not
// told.
const LocalDomain = "-"

// SupervisorName is the name of the one Supervisor of a cluster.
const SupervisorName = "default"

// NamespaceFinalizer keeps a SupervisorNamespace until its pods, its pool and
// its folder are gone.
const NamespaceFinalizer = "atoll.dev/supervisor-namespace"

// Labels that Atoll sets.
const (
	// LabelNamespace is on what was made for a SupervisorNamespace, with its
	// name as value.
	LabelNamespace = "atoll.dev/supervisor-namespace"
	// LabelTemplate is on what was made from a NamespaceTemplate, with its name
	// as value. On a Namespace that a user makes it picks the template.
	LabelTemplate = "atoll.dev/namespace-template"
	// LabelPolicyID is on a StorageClass, with the storage policy's id in vCenter.
	LabelPolicyID = "atoll.dev/storage-policy-id"
)

// Annotations of a Namespace, named as VMware's Supervisor names them, so that
// what reads them there works here.
const (
	// AnnotationPool is the managed object id of the namespace's resource pool,
	// that of the first zone where it has several. Example: "resgroup-42".
	AnnotationPool = "vmware-system-resource-pool"
	// AnnotationFolder is the managed object id of the VM folder. Example:
	// "group-v43".
	AnnotationFolder = "vmware-system-vm-folder"
	// AnnotationCPULimit is the limit in cores with four decimals, "" without
	// one. Example: "4.0000".
	AnnotationCPULimit = "vmware-system-resource-pool-cpu-limit"
	// AnnotationMemoryLimit is the limit in MiB, "" without one. Example:
	// "8192Mi".
	AnnotationMemoryLimit = "vmware-system-resource-pool-memory-limit"
	// AnnotationSelfService is "true" on a namespace made from a template.
	AnnotationSelfService = "vmware-system-self-service-namespace"
	// AnnotationCreator is the Kubernetes user that made a self-service
	// namespace; an admission policy sets it, nobody else may.
	AnnotationCreator = "atoll.dev/created-by"
	// AnnotationZones is Atoll's own: the namespace's zones, separated by
	// commas; absent where it has all of them.
	AnnotationZones = "atoll.dev/zones"
	// AnnotationVMClasses is Atoll's own: the VirtualMachineClasses that the
	// namespace may use, separated by commas.
	AnnotationVMClasses = "atoll.dev/vm-classes"
)

// Condition types of Supervisor, SupervisorNamespace, StoragePolicy and
// NamespaceTemplate.
const (
	// ConditionReady says whether the object can be used.
	ConditionReady = "Ready"
	// ConditionSynced says whether vSphere and Kubernetes are both as the spec
	// has it. While it is false or unknown, its reason and message say what
	// differs or fails, and retries go on.
	ConditionSynced = "Synced"
	// ConditionConnected, of a Supervisor: whether vCenter answers.
	ConditionConnected = "Connected"
)

// Reasons of the conditions.
const (
	ReasonSynced      = "Synced"
	ReasonProgressing = "Progressing"
	ReasonDeleting    = "Deleting"
	ReasonDraining    = "Draining" // waits for pods or VMs to end

	ReasonNoSupervisor          = "NoSupervisor"
	ReasonCredentialsInvalid    = "CredentialsInvalid" //nolint:gosec // a reason, not a credential
	ReasonCertificateNotTrusted = "CertificateNotTrusted"
	ReasonVCenterUnreachable    = "VCenterUnreachable" // down, slow, restarted: nothing is known
	ReasonPermissionDenied      = "PermissionDenied"   // the vSphere role lacks a privilege
	ReasonTaskFailed            = "TaskFailed"         // vCenter refused or broke off a change
	ReasonTaskTimeout           = "TaskTimeout"        // a change has no known outcome yet
	ReasonUnknownCluster        = "UnknownCluster"
	ReasonNoHosts               = "NoHosts" // a cluster without hosts: cores have no MHz
	ReasonNamespaceDeleted      = "NamespaceDeleted"
	ReasonUnknownZone           = "UnknownZone"
	ReasonUnknownPolicy         = "UnknownStoragePolicy"
	ReasonUnknownUser           = "UnknownUser"   // a user or group of the access list
	ReasonAccessRefused         = "AccessRefused" // a group that Atoll's own account is in
	ReasonUnknownTag            = "UnknownTag"
	ReasonUnknownClass          = "UnknownVMClass"
	ReasonLimitBelowUse         = "LimitBelowUse"
	ReasonReservationTooLarge   = "ReservationTooLarge"
	ReasonPoolNotOurs           = "PoolNotOurs" // a pool or folder of that name is another's
	ReasonNoDatastore           = "NoCompatibleDatastore"
	ReasonStorageClassNotOurs   = "StorageClassNotOurs"
	ReasonTooManyNamespaces     = "TooManyNamespaces"
	ReasonInUse                 = "InUse"
	ReasonNamespaceNotOurs      = "NamespaceNotOurs" // a Kubernetes namespace that was there before
	ReasonDrift                 = "Drift"            // somebody changed what the spec decides
	ReasonQuotaEdited           = "QuotaEdited"
	ReasonPolicyGone            = "StoragePolicyGone"
	ReasonInvalidSpec           = "InvalidSpec"
)

// Persistent volumes.
const (
	// CSIDriverName is the driver's name, in StorageClasses and
	// PersistentVolumes.
	CSIDriverName = "csi.atoll.dev"
	// DefaultPolicy is the policy of the datastore that each node has by
	// default, and the name of the StorageClass of it.
	DefaultPolicy = "atoll-local"
	// PolicyParameter of a StorageClass names a policy, PolicyIDParameter one of
	// vCenter by its id, as vSphere's own CSI driver has it.
	PolicyParameter   = "policy"
	PolicyIDParameter = "storagePolicyID"
	// ContentOfVCenter and a vCenter's instance UUID are in the label
	// snapshot.storage.kubernetes.io/managed-by of VolumeSnapshotContents which
	// the supervisor cares for, in the place of a node's name. No node is called
	// so: it has a capital.
	ContentOfVCenter = "vCenter."
	// ClaimRefused is a condition of a claim that waits for its first pod, or that
	// begins as another one: the node that was selected for it makes no volume and
	// says why. While it is True no node makes one; the supervisor has the scheduler
	// select again, or selects the node that the reason names, and takes it away.
	ClaimRefused = "atoll.dev/Refused"
	// ClaimOfNode and the name of a node are the reason of ClaimRefused where that
	// node alone can make the volume: its pod writes to the source.
	ClaimOfNode = "OnNode."
)
