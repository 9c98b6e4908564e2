package crashmatrix

import (
	"fmt"
	"slices"
	"testing"

	fp "github.com/openatoll/atoll/internal/failpoint"
)

// An operation is what a client asks for when the daemon dies.
type operation string

// In the order in which a round does them.
const (
	pullImage       operation = "PullImage"
	recoverOp       operation = "start after a crash"
	prepareOp       operation = "Prepare"
	forgetOp        operation = "Forget"
	runPod          operation = "RunPodSandbox"
	createVolume    operation = "CreateVolume"
	createContainer operation = "CreateContainer"
	startContainer  operation = "StartContainer"
	expandVolume    operation = "ExpandVolume"
	stopContainer   operation = "StopContainer"
	removeContainer operation = "RemoveContainer"
	stopPod         operation = "StopPodSandbox"
	removePod       operation = "RemovePodSandbox"
	deleteVolume    operation = "DeleteVolume"
	removeImage     operation = "RemoveImage"
)

var operations = []operation{pullImage, recoverOp, prepareOp, forgetOp, runPod, createVolume, createContainer, startContainer, expandVolume, stopContainer, removeContainer, stopPod, removePod, deleteVolume, removeImage}

// A visit is a point and which of its hits is meant; 0 is the first.
type visit struct {
	point fp.Point
	nth   int
}

// cell names the visit in the table.
func (v visit) cell() string {
	if v.nth > 1 {
		return fmt.Sprintf("`%s`, hit %d", v.point, v.nth)
	}
	return "`" + string(v.point) + "`"
}

func at(points ...fp.Point) []visit {
	var vs []visit
	for _, p := range points {
		vs = append(vs, visit{p, 0})
	}
	return vs
}

// plan has the points at which each operation is killed. The first of each is
// the short form's.
var plan = map[operation][]visit{
	pullImage: append(at(fp.PullDiskRecorded, fp.PullLeased, fp.PullManifest, fp.PullLayerKept, fp.PullLayer, fp.PullLinked, fp.PullBuilt, fp.PullNamed, fp.PullUnleased),
		visit{fp.PullLayer, 2}),
	recoverOp: at(fp.EraseDirHalf, fp.ReclaimMachineRemoved, fp.DetachTap, fp.DiskErased, fp.MasterFormatted, fp.MasterNamed,
		fp.TemplateStarted, fp.TemplateSaved, fp.TemplateRecorded, fp.WarmWaiting),
	prepareOp: at(fp.LaunchStarted, fp.RunIntentRecorded, fp.AttachTapMade, fp.DiskFormatted, fp.LaunchDirMade, fp.LaunchRecorded, fp.LaunchMonitored, fp.LaunchContinued, fp.RunAgentAnswered,
		fp.CloneDirMade, fp.CloneStarted, fp.CloneRestored, fp.CloneEquipped, fp.CloneAccounted),
	forgetOp: at(fp.DetachTap, fp.ReclaimBegun, fp.EraseSockets, fp.DiskErased, fp.HoldErased, fp.ReclaimIntentDropped),
	runPod: at(fp.RunGuestSetUp, fp.AttachRecorded, fp.AttachTapUp, fp.AttachFiltered, fp.RunNetworkAttached, fp.DiskLinked, fp.RunDiskMade, fp.LaunchDirHalf, fp.LaunchListening, fp.LaunchAccounted, fp.RunLaunched, fp.RunClaimed, fp.RunRecorded,
		fp.CloneContinued, fp.CloneRecorded, fp.CloneClaimed),
	createVolume: at(fp.VolumeFileMade, fp.VolumeIntended, fp.VolumeReady),
	createContainer: at(fp.DiskFilled, fp.CreateAgentAnswered, fp.HoldRecorded, fp.PlugRecorded, fp.PlugNodeAdded, fp.PlugDeviceAdded, fp.CreateImageReady, fp.CreateVolumeAdded, fp.CreateVolumeNoted, fp.CreateEnvironmentKept, fp.CreateRecorded,
		fp.DiskNoted, fp.VolumeLeased, fp.DiskAttached, fp.PlugVolumeNodeAdded, fp.DiskPlugged, fp.DiskMounted, fp.DiskRecorded),
	startContainer:  at(fp.StartAgentAnswered, fp.StartLogOpen, fp.StartRecorded),
	expandVolume:    at(fp.DiskResized, fp.VolumeGrowing, fp.VolumeGrown),
	stopContainer:   at(fp.ExitLogsDrained, fp.StopSignalled, fp.ExitArrived, fp.ExitRecorded, fp.ExitAcknowledged),
	removeContainer: at(fp.RemoveGuestRemoved, fp.RemoveKilled, fp.RemoveRecordErased, fp.RemoveErased),
	stopPod:         at(fp.VolumeLeaseEnded, fp.QuitGone, fp.StopPodKilled, fp.QuitIntended, fp.QuitRecorded, fp.StopPodContainersMarked, fp.StopPodMachineStopped, fp.DetachFilter, fp.DetachRecord, fp.HoldErased, fp.StopPodReleased, fp.StopPodRecorded, fp.DiskUnmounted, fp.DiskDetached),
	removePod:       at(fp.EraseDirHalf, fp.EraseCgroups, fp.EraseDirComplete, fp.ReclaimMachineRemoved, fp.ReclaimPartsRemoved, fp.RemovePodContainers, fp.RemovePodErased),
	deleteVolume:    at(fp.VolumeFilesErased, fp.VolumeDeleting, fp.VolumeErased),
	removeImage:     at(fp.ImageUnnamed, fp.ImageCollected, fp.ImageDiskForgot, fp.ImageDiskErased, fp.ImageLayersForgot),
}

// rounds is the plan as rounds: the i-th has the i-th visit of each operation
// that has so many.
func rounds(short bool) []map[operation]visit {
	var rs []map[operation]visit
	for i := 0; ; i++ {
		r := map[operation]visit{}
		for op, visits := range plan {
			if i < len(visits) {
				r[op] = visits[i]
			}
		}
		if len(r) == 0 || short && i > 0 {
			return rs
		}
		rs = append(rs, r)
	}
}

func TestThePlanHasEveryPoint(t *testing.T) {
	planned := map[fp.Point]bool{}
	for op, visits := range plan {
		if !slices.Contains(operations, op) {
			t.Errorf("no round does %s", op)
		}
		for _, v := range visits {
			planned[v.point] = true
		}
	}
	elsewhere := at(fp.VolumeCopyIntended, fp.VolumeCopied, fp.VolumeOverlayIntended, fp.VolumeOverlayMade, fp.VolumeOverlaid, fp.SnapshotCopied, fp.SnapshotReady, fp.VolumeTopIntended, fp.VolumeLiveCopied,
		fp.DiskCopyTarget, fp.DiskCopyMapped, fp.DiskCopyStarted, fp.DiskCopyEnded)
	for _, p := range elsewhere { // storage/local and vmpod/qemu kill a process at these
		planned[p.point] = true
	}
	for _, p := range slices.Concat(fp.All, fp.Volumes) {
		if !planned[p] {
			t.Errorf("the matrix never kills at %s: add it to the plan, at an operation that meets it", p)
		}
	}
	if short := rounds(true); len(short) != 1 || len(short[0]) != len(operations) {
		t.Errorf("the short form is %v, must have each operation once", short)
	}
}
