package main

const (
	oneVM       = "A volume is a disk of one pod's VM at a time, in which all containers of the pod share it."
	noSnapshots = "The pattern has volumes without snapshots: the suite's own choice."
	noGroups    = "Snapshots of several volumes at one instant are not offered."
	byTheSuite  = "The test is not meant for this kind of volume: the suite's own choice."
)

// skips explains what the suite skips by itself. The first that fits counts.
var skips = []explanation{
	{`volume type "(InlineVolume|PreprovisionedPV)"`, ``, "Upstream has tests with volumes in the pod's spec and with volumes made by hand for drivers that are compiled in, none for those of a file."},
	{`CSIInlineVolume test for expansion`, ``, "An inline volume has no claim that could be grown."},
	{`ntfs|[Ww]indows`, ``, "Windows."},
	{`ext3`, ``, "The guest makes ext4 and xfs."},
	{`singleNodeVolume`, ``, "Volumes of the default class stay on their node. (Those of shared datastores do not.)"},
	{`multiple concurrent pods|multiple PVs|doesn't support RWX|ROX access mode|ReadOnlyMany`, ``, oneVM},
	{`read only raw block|read-only`, ``, byTheSuite},
	{`[Gg]roup ?[Ss]napshot|VolumeGroupSnapshot`, ``, noGroups},
	{`snapshot metadata`, ``, "Changed blocks between snapshots are not told."},
	{`[Ss]napshot`, ``, noSnapshots},
	{`VolumeAttributesClass|volume modify`, ``, "A volume's policy is chosen when it is made and does not change (no MODIFY_VOLUME)."},
	{`SELinux`, ``, "The guest has no SELinux."},
	{`volume limits`, ``, "The driver tells the scheduler of no limit on disks for a node: each pod's VM has its own."},
	{`performance test`, ``, "The suite has no thresholds of its own, and takes no class that waits for its first consumer. `make bench` measures volumes."},
	{`VolumeBindingMode immediate|immediate binding`, ``, "The class waits for the first consumer: a local disk is made where the pod runs."},
	{`Filesystem volume case|Block volumes do not|not valid for Block|not implemented|block mode|Suite ".*" does not support|is ephemeral|is not ephemeral|not work with|test for expansion|only supports|non-filesystem|doesn't work with`, ``, byTheSuite},
	{`Not enough topologies|available nodes`, ``, "The cluster of this test has one node."},
}

// failures explains what fails. Nothing does.
var failures []explanation
