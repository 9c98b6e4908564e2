package agentapi

// Protocol is what this version speaks, and HelloResponse.protocol of its
// guests. It rises with what a host must be able to rely on.
const Protocol = 2

// ProtocolIdentity is the first in which a guest refuses to run anything
// before it has an identity of its own, all of it, and keeps its clock by the
// host's. A host sets up no guest with less: the pods of one template could
// share their keys.
const ProtocolIdentity = 2

// Features of guests in HelloResponse, beside what their kernels can do.
const (
	// FeatureDisks: volumes of kind DISK. A guest without it takes one for an
	// empty directory.
	FeatureDisks = "disks"
	// FeatureXFS: they may have xfs.
	FeatureXFS = "xfs"
	// FeatureSubPaths: the call PrepareSubPath. Without it a sub-path is first
	// looked at in CreateContainer.
	FeatureSubPaths = "subpaths"
)
