// Package cri serves the Kubernetes Container Runtime Interface (runtime/v1)
// over pod VMs: every sandbox is one machine of a vmpod.Driver, every
// container a process tree that podinit runs inside it.
//
// What the package keeps is small: one ordered store of sandboxes and
// containers (store.go) which feeds lists, status, events and Subscribe alike,
// and one pod object a live sandbox with the session to its agent. Everything
// else is asked of its owner: the driver for machines, netplugin for
// addresses, storage for disks, the guest for processes. An intent is written
// before anything is made for a sandbox, so that a process that dies at any
// instant leaves a note of what to take back (adopt.go).
//
// Operations that change a pod's structure (run, create, stop, remove) are
// serialised for that pod and run side by side for different ones; waiting for
// a container to stop blocks nobody.
package cri
