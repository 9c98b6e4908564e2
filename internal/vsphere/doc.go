// Package vsphere is what everything in Atoll that talks to a vCenter shares: a
// session that logs in again when it was dropped (Session), tasks whose result
// is checked (Tasks), one PropertyCollector watch (Watch), and errors with a
// class of containerd/errdefs (Error).
//
// A vCenter that does not answer, or refuses the login, says nothing about its
// objects: such errors are ErrUnavailable, and no caller may conclude from one
// that something is gone or was not done.
package vsphere
