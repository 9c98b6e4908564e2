// Package qemu runs pod VMs on this host: it is the vmpod.Driver for QEMU with
// KVM or, where KVM is missing or useless, QEMU's own emulation (TCG).
//
// A VM is one QEMU process and one directory below Config.StateDir:
//
//	<id>/spec.json     the Spec, written and synced before anything is made
//	<id>/process.json  which process it is: pid, its start time, the host's boot
//	<id>/devices.json  what was plugged since
//	<id>/shares/       where the servers of host directories have them mounted,
//	                   in namespaces of their own, and what those servers said
//	<id>/stop.json     that Stop was asked for, written before it is tried
//	<id>/exit.json     how it ended, written by whoever saw it first
//	<id>/console.log   the serial console, bounded (console.log.1 is older)
//	<id>/stderr.log    what QEMU itself said
//
// The process is the store of record: a new Driver over the same directories
// finds every VM again, adopts what runs, finishes or undoes what was left half
// done. QEMU is started in a session of its own with sockets and files handed
// over as descriptors, so it outlives the driver and needs no right to any path.
//
// Most VMs do not boot: they are clones of templates, guests that have booted
// once (docs/decisions/0010-templates.md). Templates are in memory, with
//
//	RunDir/templates/<key>.<time>.state   the state of the devices
//	RunDir/templates/<key>.json           what it is, and digests, for the next driver
//	RunDir/templates/<vm>.stderr          what a QEMU said that is no pod's yet
//
// What is on QEMU's command line, and why, is in
// docs/decisions/0003-qemu-command-line.md.
package qemu
