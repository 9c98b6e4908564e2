package v1alpha1

// SphereletKind is the kind of a spherelet's configuration file.
const SphereletKind = "SphereletConfiguration"

// SphereletConfiguration configures one spherelet: one node. It is read
// strictly: an unknown key is an error that names it.
//
// +kubebuilder:object:generate=false
type SphereletConfiguration struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`

	// NodeName is the Node's name; default: the host's name.
	NodeName string `json:"nodeName,omitempty"`
	// NodeIP is the address the node registers and serves on; default: the
	// address of the default route's interface.
	NodeIP string `json:"nodeIP,omitempty"`
	// DataDir holds everything that outlives a restart: images, disks, pod
	// state, certificates. Required.
	DataDir string `json:"dataDir"`
	// RunDir holds sockets; short, because unix socket paths end at 107
	// bytes. Default: /run/atoll/<hash of DataDir>.
	RunDir string `json:"runDir,omitempty"`
	// Kubeconfig is the node's own; written by TLS bootstrap when missing.
	// Default: DataDir/kubeconfig.
	Kubeconfig string `json:"kubeconfig,omitempty"`
	// BootstrapKubeconfig carries the bootstrap token of a node that joins.
	BootstrapKubeconfig string `json:"bootstrapKubeconfig,omitempty"`
	// ClientCAFile verifies clients of the node's API. Required.
	ClientCAFile string `json:"clientCAFile"`
	// Port of the kubelet API (default 10250) and HealthPort of /healthz and
	// /metrics on loopback (default 10248; -1 switches it off).
	Port       int32 `json:"port,omitempty"`
	HealthPort int32 `json:"healthPort,omitempty"`
	// ClusterDNS and ClusterDomain are what pods resolve with.
	ClusterDNS    []string `json:"clusterDNS,omitempty"`
	ClusterDomain string   `json:"clusterDomain,omitempty"`
	// MaxPods on this node, 1 to 1000; default 250.
	MaxPods int32 `json:"maxPods,omitempty"`
	// Labels and Taints with which the node registers. Labels of the domain
	// atoll.dev are the spherelet's own: accelerator (kvm or tcg), kvm
	// (usable, unusable or absent) and guest-kernel (stock or tuned).
	Labels map[string]string `json:"labels,omitempty"`
	Taints []string          `json:"taints,omitempty"`
	// NetworkNamespace (a path or a name under /run/netns) that the process
	// enters first; empty: stays where it was started.
	NetworkNamespace string `json:"networkNamespace,omitempty"`

	// KubeProxy serves Services on this node; default true.
	KubeProxy *bool `json:"kubeProxy,omitempty"`
	// ClusterCIDR is the range of all pods of the cluster. Required for
	// KubeProxy.
	ClusterCIDR string `json:"clusterCIDR,omitempty"`

	// KubeReserved and SystemReserved are kept from pods, as the kubelet's
	// settings of the same names ("cpu", "memory", "ephemeral-storage").
	// KubeReserved defaults to 100m of CPU and 256 MiB and a twentieth of the
	// RAM (at most 4 GiB, at most a quarter), which leaves room for QEMU.
	KubeReserved   map[string]string `json:"kubeReserved,omitempty"`
	SystemReserved map[string]string `json:"systemReserved,omitempty"`
	// EvictionHard, as the kubelet's; default memory.available 100Mi,
	// nodefs.available, nodefs.inodesFree and imagefs.available 5%.
	EvictionHard map[string]string `json:"evictionHard,omitempty"`

	Hypervisor HypervisorConfiguration `json:"hypervisor,omitempty"`
	Templates  TemplatesConfiguration  `json:"templates,omitempty"`
	Images     ImagesConfiguration     `json:"images,omitempty"`
	Streaming  StreamingConfiguration  `json:"streaming,omitempty"`
	// Tracing sends spans of the kubelet, the runtime and its calls into pod
	// VMs; default none.
	Tracing *TracingConfiguration `json:"tracing,omitempty"`
	// HostDirectories are the directories of this host that pods may mount by
	// hostPath, live; default none. Everybody who may create pods on this node
	// can then read, and unless they are read-only change, all that lies below
	// them.
	HostDirectories []HostDirectory      `json:"hostDirectories,omitempty"`
	Storage         StorageConfiguration `json:"storage,omitempty"`

	// LogLevel is debug, info (default), warn or error; KubeletVerbosity is
	// upstream's -v, 0 to 7 (more would log the bodies of Secrets).
	LogLevel         string `json:"logLevel,omitempty"`
	KubeletVerbosity int32  `json:"kubeletVerbosity,omitempty"`
}

// HostDirectory is a directory of the host that pods may use as it is.
//
// +kubebuilder:object:generate=false
type HostDirectory struct {
	// Path is absolute and without symbolic links, and is there when the
	// spherelet starts. It is neither /, nor above or below a directory of the
	// spherelet or a file system of the kernel.
	Path string `json:"path"`
	// ReadOnly allows only mounts that are read-only.
	ReadOnly bool `json:"readOnly,omitempty"`
}

// HypervisorConfiguration says how pod VMs are run on this host.
//
// +kubebuilder:object:generate=false
type HypervisorConfiguration struct {
	// QEMU is the emulator; default: qemu-system-x86_64 in PATH.
	QEMU string `json:"qemu,omitempty"`
	// Accelerator is "auto" (default: KVM when the probe finds it usable,
	// else TCG), "kvm" or "tcg".
	Accelerator string `json:"accelerator,omitempty"`
	// Guest is the directory with kernel and initramfs as `make guest` lays
	// it out. Required.
	Guest string `json:"guest,omitempty"`
	// User runs every QEMU, with its own gid: a name or a number. By default
	// each VM has a user of its own, of 400417 to 465952, which own nothing.
	User string `json:"user,omitempty"`
	// EphemeralDefault is the size of a pod's writable disk when the pod sets
	// no ephemeral-storage limit, as a quantity; default "10Gi".
	EphemeralDefault string `json:"ephemeralDefault,omitempty"`
}

// TemplatesConfiguration is about the guests from which pod VMs are cloned
// instead of booted. There are none on a node with HostDirectories.
//
// +kubebuilder:object:generate=false
type TemplatesConfiguration struct {
	// Enabled; default true. Without, every pod VM boots.
	Enabled *bool `json:"enabled,omitempty"`
	// PerTenant keeps a template for each namespace, so that pods of different
	// ones have no page of memory in common; then none is made before a
	// namespace's first pod, which boots.
	PerTenant bool `json:"perTenant,omitempty"`
	// Memory is what templates, and clones that wait, may cost the host, as a
	// quantity, at least 64Mi; default "512Mi". One template is always kept.
	Memory string `json:"memory,omitempty"`
	// Warm is how many clones of the usual size wait for a pod, 0 to 64;
	// default 0.
	Warm int32 `json:"warm,omitempty"`
}

// ImagesConfiguration says where images come from.
//
// +kubebuilder:object:generate=false
type ImagesConfiguration struct {
	// HostsDir has hosts.toml files, one directory a registry, as containerd
	// reads them from /etc/containerd/certs.d.
	HostsDir string `json:"hostsDir,omitempty"`
	// MaxConcurrentDownloads of layers; default 3.
	MaxConcurrentDownloads int `json:"maxConcurrentDownloads,omitempty"`
	// ProgressTimeout ends a pull for which a registry has sent nothing for so
	// long, as a duration; default "60s".
	ProgressTimeout string `json:"progressTimeout,omitempty"`
	// MaxUnpackedSize bounds what the layers of one image may unpack to, as a
	// quantity, at least 64Mi; default "64Gi". A larger image is refused.
	MaxUnpackedSize string `json:"maxUnpackedSize,omitempty"`
	// GCHighThresholdPercent and GCLowThresholdPercent are the kubelet's
	// imageGCHighThresholdPercent and imageGCLowThresholdPercent: how full the
	// file system of DataDir is, whatever fills it, when images that no pod
	// uses are taken away, and down to what; 0 to 100 each, the low one below
	// the high one; default 85 and 80. A high threshold of 100 takes none away.
	GCHighThresholdPercent *int32 `json:"gcHighThresholdPercent,omitempty"`
	GCLowThresholdPercent  *int32 `json:"gcLowThresholdPercent,omitempty"`
}

// StreamingConfiguration is about exec, attach and port-forward between the
// kubelet, or another client of the CRI, and the runtime: on loopback alone.
//
// +kubebuilder:object:generate=false
type StreamingConfiguration struct {
	// IdleTimeout ends a stream over which nothing went for so long, as a
	// duration; default none.
	IdleTimeout string `json:"idleTimeout,omitempty"`
	// CertFile and KeyFile (PEM) make streams HTTPS; default plain HTTP.
	CertFile string `json:"certFile,omitempty"`
	KeyFile  string `json:"keyFile,omitempty"`
}

// TracingConfiguration says where OpenTelemetry spans go, as the kubelet's
// setting of the same name.
//
// +kubebuilder:object:generate=false
type TracingConfiguration struct {
	// Endpoint is the collector's host and port (OTLP over gRPC, without TLS);
	// default "localhost:4317".
	Endpoint string `json:"endpoint,omitempty"`
	// SamplingRatePerMillion is how many of a million syncs of pods are traced
	// that nobody has traced above, 0 to 1000000; default 0: only those.
	SamplingRatePerMillion int32 `json:"samplingRatePerMillion,omitempty"`
}

// StorageConfiguration is about persistent volumes.
//
// +kubebuilder:object:generate=false
type StorageConfiguration struct {
	// Disabled: the node offers none, and pods that use some are refused.
	Disabled bool `json:"disabled,omitempty"`
	// Datastores are where volumes are; default one, "local", in
	// DataDir/volumes, with the policy "atoll-local".
	Datastores []Datastore `json:"datastores,omitempty"`
}

// Datastore is a directory that volumes may take, with all below it. Atoll
// leaves a mark in it, and touches nothing that it did not make.
//
// +kubebuilder:object:generate=false
type Datastore struct {
	// Name is a DNS label, unique on this host.
	Name string `json:"name"`
	// Path is absolute.
	Path string `json:"path"`
	// MountPoint: something must be mounted at Path, or the datastore is taken
	// for one that is away.
	MountPoint bool `json:"mountPoint,omitempty"`
	// Shared: other nodes have the same directory, on a file system whose locks
	// hold between them, such as NFS.
	Shared bool `json:"shared,omitempty"`
	// Format of volumes: "raw" (default) or "qcow2".
	Format string `json:"format,omitempty"`
	// Policies that volumes here keep. Datastores that offer a policy of one name
	// promise the same.
	Policies []DatastorePolicy `json:"policies"`
}

// DatastorePolicy is what a StorageClass promises; a class names it with the
// parameter "policy".
//
// +kubebuilder:object:generate=false
type DatastorePolicy struct {
	// Name is a DNS label.
	Name        string `json:"name"`
	Description string `json:"description,omitempty"`
	// Thick reserves a volume's bytes when it is made.
	Thick bool `json:"thick,omitempty"`
	// Encrypted volumes are in LUKS, with the key in KeyFile.
	Encrypted bool `json:"encrypted,omitempty"`
	// KeyFile has 16 to 512 bytes that only its owner can read; required with
	// Encrypted.
	KeyFile string `json:"keyFile,omitempty"`
	// IOPS and Bandwidth (bytes a second, as a quantity) bound each volume, reads
	// and writes together; default no bound.
	IOPS      int64  `json:"iops,omitempty"`
	Bandwidth string `json:"bandwidth,omitempty"`
}
