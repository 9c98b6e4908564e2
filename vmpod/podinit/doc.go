// Package podinit is PID 1 of every pod VM: it sets the machine up, keeps
// nothing running but the pod's containers, and serves agentapi to the host.
//
// It trusts the host and nothing else. Containers run by crun; everything
// they can write (images, volumes, their own root) is resolved below its own
// root and never followed out of it.
//
// While nothing happens it uses no CPU: there are no periodic timers, and the
// channel is waited for by the runtime's poller, whether a host is there or
// not.
//
// Places inside the guest:
//
//	/run/atoll/disk         the ephemeral disk (a tmpfs where there is none)
//	/run/atoll/disk/c/ID    a container's writable layer, logs, termination message
//	/run/atoll/disk/v/ID    EMPTY_DIR volumes
//	/run/atoll/v/ID         TREE and TMPFS volumes, in memory
//	/run/atoll/images/DISK  image disks, mounted once each
//	/run/atoll/c/ID         a container's bundle and root
package podinit
