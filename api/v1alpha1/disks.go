package v1alpha1

// Metrics of a node's volumes, among those of its kubelet. `atoll get disks`
// reads them there.
const (
	MetricDisk      = "atoll_disk"
	MetricDiskSize  = "atoll_disk_size_bytes"
	MetricDiskUsed  = "atoll_disk_used_bytes"
	MetricDatastore = "atoll_datastore"
	MetricDisksAge  = "atoll_disks_age_seconds"
)

// Labels of MetricDatastore.
const (
	DatastoreName    = "name"
	DatastoreID      = "id"
	DatastoreProblem = "problem"
)

// Labels of MetricDisk. The others have DiskID alone.
const (
	DiskID          = "id"   // the volume handle; of a file its datastore's name and its own
	DiskKind        = "kind" // volume, or file: one that no record stands for
	DiskName        = "name"
	DiskPolicy      = "policy"
	DiskDatastore   = "datastore"
	DiskDatastoreID = "datastore_id"
	DiskFormat      = "format"
	DiskEncrypted   = "encrypted"
	DiskVM          = "vm" // who has it open, and on which node
	DiskHost        = "host"
	DiskDamage      = "damage"
	DiskUnfinished  = "unfinished" // it is being made or deleted, by whom
	DiskCompliance  = "compliance"
	DiskReason      = "reason"
	DiskNamespace   = "namespace" // of the claim that it was made for
	DiskClaim       = "claim"
	DiskCreated     = "created"
)

// DiskLabels are those of MetricDisk, in the order in which nodes give them.
func DiskLabels() []string {
	return []string{
		DiskID, DiskKind, DiskName, DiskPolicy, DiskDatastore, DiskDatastoreID, DiskFormat, DiskEncrypted,
		DiskVM, DiskHost, DiskDamage, DiskUnfinished, DiskCompliance, DiskReason, DiskNamespace, DiskClaim, DiskCreated,
	}
}
