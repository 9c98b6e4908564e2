package main

// An exclusion is a spec that a pod in a virtual machine cannot pass, as it
// presumes that host and pod share one kernel or its file systems.
type exclusion struct {
	spec   string // a regular expression on the spec's full name
	reason string
}

const (
	ownKernel = "The pod has its own kernel, so it cannot be in the host's "
	copied    = "A host directory is copied into the guest and read-only there: no mount made on the host, and no write made in the container, reaches the other side. "
)

var exclusions = []exclusion{
	{`NamespaceOption runtime should support HostPID$`, ownKernel + "PID namespace. Refused with the reason."},
	{`NamespaceOption runtime should support HostIpc is true$`, ownKernel + "IPC namespace. Refused with the reason."},
	{`NamespaceOption runtime should support HostNetwork is true$`, ownKernel + "network namespace. Refused with the reason."},
	{`Streaming .* runtime should support portforward in host network$`, ownKernel + "network namespace. Forwarding to a pod's own network is tested by another spec."},
	{`Mount Propagation .* mount with 'rshared' `, copied + "Propagation between containers and volumes of a pod works, inside its guest."},
	{`Mount Propagation .* mount with 'rslave' `, copied + "Propagation between containers and volumes of a pod works, inside its guest."},
	{`Mount Propagation .* mount with 'rprivate' `, copied + "The spec makes a directory in the container and reads it on the host."},
}
