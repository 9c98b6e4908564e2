// Package namespaces keeps SupervisorNamespaces true on both sides: a
// Kubernetes Namespace with quotas, defaults and rights, and pools, a folder and
// permissions in vSphere (package vc). It also reads storage policies into
// StoragePolicies and StorageClasses, and lets developers make namespaces from
// NamespaceTemplates.
//
// What maps to what, and who wins when both sides differ, is in
// docs/namespaces.md.
//
// # After a crash
//
// Nothing is kept but what is on the objects themselves. A finalizer is there
// before the first object in vSphere; status.lastSynced is taken away before
// limits in vSphere are changed and comes back when both sides are in step, so
// that a change that was cut short is finished and not taken for an
// administrator's. Deletion goes by vCenter's answers alone: while it does not
// answer, nothing is concluded to be gone.
package namespaces
