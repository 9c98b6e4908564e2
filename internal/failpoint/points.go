package failpoint

// A Point is the name of one instant: part/act/what has just happened.
type Point string

// Points of Prepare and RunPodSandbox.
const (
	RunIntentRecorded  Point = "cri/run/intent-recorded"
	RunNetworkAttached Point = "cri/run/network-attached"
	RunDiskMade        Point = "cri/run/disk-made"
	RunLaunched        Point = "cri/run/launched"
	RunAgentAnswered   Point = "cri/run/agent-answered"
	RunClaimed         Point = "cri/run/preparation-claimed"
	RunGuestSetUp      Point = "cri/run/guest-set-up"
	RunRecorded        Point = "cri/run/sandbox-recorded"
)

// Points of CreateContainer.
const (
	CreateImageReady      Point = "cri/create/image-ready"
	CreateVolumeAdded     Point = "cri/create/volume-added"
	CreateVolumeNoted     Point = "cri/create/volume-recorded"
	CreateAgentAnswered   Point = "cri/create/agent-answered"
	CreateEnvironmentKept Point = "cri/create/environment-kept"
	CreateRecorded        Point = "cri/create/container-recorded"
)

// Points of volumes that are disks, in the order in which a pod meets them.
const (
	DiskNoted     Point = "cri/volume/intent-recorded"
	DiskAttached  Point = "cri/volume/attached"
	DiskPlugged   Point = "cri/volume/plugged"
	DiskFilled    Point = "cri/volume/formatted"
	DiskMounted   Point = "cri/volume/mounted"
	DiskRecorded  Point = "cri/volume/recorded"
	DiskResized   Point = "cri/volume/resized"
	DiskUnmounted Point = "cri/volume/unmounted"
	DiskDetached  Point = "cri/volume/detached"
)

// Points of StartContainer.
const (
	StartLogOpen       Point = "cri/start/log-open"
	StartAgentAnswered Point = "cri/start/agent-answered"
	StartRecorded      Point = "cri/start/start-recorded"
)

// Points of StopContainer, and of every exit.
const (
	StopSignalled    Point = "cri/stop/signalled"
	ExitArrived      Point = "cri/exit/arrived"
	ExitLogsDrained  Point = "cri/exit/logs-drained"
	ExitRecorded     Point = "cri/exit/exit-recorded"
	ExitAcknowledged Point = "cri/exit/acknowledged"
)

// Points of RemoveContainer.
const (
	RemoveKilled       Point = "cri/remove/killed"
	RemoveGuestRemoved Point = "cri/remove/guest-removed"
	RemoveRecordErased Point = "cri/remove/record-erased"
	RemoveErased       Point = "cri/remove/secrets-erased"
)

// Points of StopPodSandbox.
const (
	StopPodKilled           Point = "cri/stop-pod/containers-killed"
	StopPodContainersMarked Point = "cri/stop-pod/containers-marked"
	StopPodMachineStopped   Point = "cri/stop-pod/machine-stopped"
	StopPodReleased         Point = "cri/stop-pod/network-and-images-released"
	StopPodRecorded         Point = "cri/stop-pod/release-recorded"
)

// Points of RemovePodSandbox, and of taking back what was half made.
const (
	ReclaimBegun          Point = "cri/reclaim/begun"
	ReclaimMachineRemoved Point = "cri/reclaim/machine-removed"
	ReclaimPartsRemoved   Point = "cri/reclaim/parts-removed"
	ReclaimIntentDropped  Point = "cri/reclaim/intent-dropped"
	RemovePodContainers   Point = "cri/remove-pod/containers-erased"
	RemovePodErased       Point = "cri/remove-pod/sandbox-erased"
)

// Points of the QEMU driver.
const (
	LaunchDirHalf   Point = "qemu/launch/directory-half-made"
	LaunchDirMade   Point = "qemu/launch/directory-made"
	LaunchListening Point = "qemu/launch/sockets-listening"
	LaunchStarted   Point = "qemu/launch/process-started"
	LaunchRecorded  Point = "qemu/launch/process-recorded"
	LaunchMonitored Point = "qemu/launch/monitor-answered"
	LaunchAccounted Point = "qemu/launch/cgroups-made"
	LaunchContinued Point = "qemu/launch/cpus-started"
	PlugRecorded    Point = "qemu/plug/intent-recorded"
	PlugNodeAdded   Point = "qemu/plug/node-added"
	PlugDeviceAdded Point = "qemu/plug/device-added"

	PlugVolumeNodeAdded Point = "qemu/plug/volume-node-added"

	DiskCopyTarget  Point = "qemu/copy/target-added"
	DiskCopyMapped  Point = "qemu/copy/data-mapped"
	DiskCopyStarted Point = "qemu/copy/job-started"
	DiskCopyEnded   Point = "qemu/copy/job-ended"

	QuitIntended     Point = "qemu/stop/intent-recorded"
	QuitGone         Point = "qemu/stop/process-gone"
	QuitRecorded     Point = "qemu/stop/exit-recorded"
	EraseCgroups     Point = "qemu/remove/cgroups-removed"
	EraseSockets     Point = "qemu/remove/sockets-removed"
	EraseDirHalf     Point = "qemu/remove/directory-renamed"
	EraseDirComplete Point = "qemu/remove/directory-erased"
)

// Points of the QEMU driver's templates and clones.
const (
	TemplateStarted  Point = "qemu/template/process-started"
	TemplateSaved    Point = "qemu/template/state-saved"
	TemplateRecorded Point = "qemu/template/recorded"
	WarmWaiting      Point = "qemu/warm/waiting"
	CloneDirMade     Point = "qemu/clone/directory-made"
	CloneStarted     Point = "qemu/clone/process-started"
	CloneClaimed     Point = "qemu/clone/warm-claimed"
	CloneRestored    Point = "qemu/clone/state-restored"
	CloneEquipped    Point = "qemu/clone/devices-plugged"
	CloneAccounted   Point = "qemu/clone/cgroups-made"
	CloneContinued   Point = "qemu/clone/cpus-started"
	CloneRecorded    Point = "qemu/clone/process-recorded"
)

// Points of the pod network.
const (
	AttachRecorded Point = "tap/attach/recorded"
	AttachTapMade  Point = "tap/attach/tap-made"
	AttachTapUp    Point = "tap/attach/tap-up"
	AttachFiltered Point = "tap/attach/filter-added"
	DetachFilter   Point = "tap/detach/filter-removed"
	DetachTap      Point = "tap/detach/tap-removed"
	DetachRecord   Point = "tap/detach/record-erased"
)

// Points of the pods' writable disks.
const (
	MasterFormatted Point = "disk/master/formatted"
	MasterNamed     Point = "disk/master/named"
	DiskFormatted   Point = "disk/create/formatted"
	DiskLinked      Point = "disk/create/linked"
	DiskErased      Point = "disk/remove/erased"
)

// Points of the volumes in a host's datastores.
const (
	VolumeIntended        Point = "volume/create/intent-recorded"
	VolumeFileMade        Point = "volume/create/file-made"
	VolumeCopyIntended    Point = "volume/copy/intent-recorded"
	VolumeCopied          Point = "volume/copy/file-made"
	VolumeOverlayIntended Point = "volume/overlay/intent-recorded"
	VolumeOverlayMade     Point = "volume/overlay/file-made"
	VolumeOverlaid        Point = "volume/overlay/source-recorded"
	VolumeTopIntended     Point = "volume/live/intent-recorded"
	VolumeLiveCopied      Point = "volume/live/copied"
	VolumeReady           Point = "volume/create/recorded"
	SnapshotCopied        Point = "volume/snapshot/file-made"
	SnapshotReady         Point = "volume/snapshot/recorded"
	VolumeLeased          Point = "volume/attach/lease-recorded"
	VolumeGrowing         Point = "volume/expand/intent-recorded"
	VolumeGrown           Point = "volume/expand/file-grown"
	VolumeLeaseEnded      Point = "volume/detach/lease-erased"
	VolumeDeleting        Point = "volume/delete/intent-recorded"
	VolumeFilesErased     Point = "volume/delete/files-erased"
	VolumeErased          Point = "volume/delete/record-erased"
)

// Points of the image store.
const (
	PullLeased        Point = "image/pull/leased"
	PullManifest      Point = "image/pull/manifest-committed"
	PullLayerKept     Point = "image/pull/layer-files-kept"
	PullLayer         Point = "image/pull/layer-committed"
	PullLinked        Point = "image/pull/layers-linked"
	PullBuilt         Point = "image/pull/disk-built"
	PullDiskRecorded  Point = "image/pull/disk-recorded"
	PullNamed         Point = "image/pull/names-recorded"
	PullUnleased      Point = "image/pull/lease-ended"
	HoldRecorded      Point = "image/hold/recorded"
	HoldErased        Point = "image/hold/erased"
	ImageUnnamed      Point = "image/remove/names-erased"
	ImageCollected    Point = "image/remove/content-erased"
	ImageDiskForgot   Point = "image/remove/disk-record-erased"
	ImageDiskErased   Point = "image/remove/disk-erased"
	ImageLayersForgot Point = "image/remove/layer-records-erased"
)

// All are the points, in the order in which a pod meets them.
var All = []Point{
	PullLeased, PullManifest, PullLayerKept, PullLayer, PullLinked, PullBuilt, PullDiskRecorded, PullNamed, PullUnleased,
	RunIntentRecorded, AttachRecorded, AttachTapMade, AttachTapUp, AttachFiltered, RunNetworkAttached,
	MasterFormatted, MasterNamed, DiskFormatted, DiskLinked, RunDiskMade,
	LaunchDirHalf, LaunchDirMade, LaunchListening, LaunchStarted, LaunchRecorded, LaunchMonitored, LaunchAccounted, LaunchContinued,
	TemplateStarted, TemplateSaved, TemplateRecorded, WarmWaiting,
	CloneDirMade, CloneStarted, CloneClaimed, CloneRestored, CloneEquipped, CloneAccounted, CloneContinued, CloneRecorded,
	RunLaunched, RunAgentAnswered, RunClaimed, RunGuestSetUp, RunRecorded,
	HoldRecorded, PlugRecorded, PlugNodeAdded, PlugDeviceAdded,
	CreateImageReady, CreateVolumeAdded, CreateVolumeNoted, CreateAgentAnswered, CreateEnvironmentKept, CreateRecorded,
	StartLogOpen, StartAgentAnswered, StartRecorded,
	StopSignalled, ExitArrived, ExitLogsDrained, ExitRecorded, ExitAcknowledged,
	RemoveKilled, RemoveGuestRemoved, RemoveRecordErased, RemoveErased,
	StopPodKilled, QuitIntended, QuitGone, QuitRecorded, StopPodContainersMarked, StopPodMachineStopped,
	DetachFilter, DetachTap, DetachRecord, HoldErased, StopPodReleased, StopPodRecorded,
	ReclaimBegun, EraseCgroups, EraseSockets, EraseDirHalf, EraseDirComplete, ReclaimMachineRemoved,
	DiskErased, ReclaimPartsRemoved, ReclaimIntentDropped, RemovePodContainers, RemovePodErased,
	ImageUnnamed, ImageCollected, ImageDiskForgot, ImageDiskErased, ImageLayersForgot,
}

// Volumes are the points that a pod meets only with volumes. Those of copies and
// snapshots the crash matrix leaves to the tests of storage/local and vmpod/qemu.
var Volumes = []Point{
	PlugVolumeNodeAdded,
	VolumeIntended, VolumeFileMade, VolumeCopyIntended, VolumeCopied, VolumeOverlayIntended, VolumeOverlayMade, VolumeOverlaid, VolumeTopIntended, VolumeLiveCopied, VolumeReady,
	DiskCopyTarget, DiskCopyMapped, DiskCopyStarted, DiskCopyEnded,
	SnapshotCopied, SnapshotReady, VolumeLeased, VolumeGrowing, VolumeGrown, VolumeLeaseEnded, VolumeDeleting, VolumeFilesErased, VolumeErased,
	DiskNoted, DiskAttached, DiskPlugged, DiskFilled, DiskMounted, DiskRecorded, DiskResized, DiskUnmounted, DiskDetached,
}
