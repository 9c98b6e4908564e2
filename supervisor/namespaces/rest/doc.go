// Package rest serves vSphere's own REST API of namespaces, so that automation
// written for VMware's Supervisor (govc, PowerCLI, Ansible, curl) works against
// Atoll: a facade over the objects of api/v1alpha1 that keeps nothing itself.
//
// Paths, field names, status codes and errors are those of the vSphere
// Automation API, https://developer.broadcom.com/xapis/vsphere-automation-api
// (7.0 to 9.1). What that API has and Atoll has nothing for is refused as
// UNSUPPORTED with the reason and the alternative, never ignored. Routes lists
// what is served; docs/namespaces-rest.md says what each call maps to.
//
// Users are vCenter's, and may do what their privileges in vCenter allow: on a
// namespace's resource pools, on the cluster where one is made, on the root
// folder for VM classes. In Kubernetes all is done by the supervisor.
package rest
