package main

// An exclusion is a spec that a pod in a virtual machine cannot pass, as it
// presumes that host and pod share one kernel or its file systems.
type exclusion struct {
	spec   string // a regular expression on the spec's full name
	reason string
}

const ownKernel = "The pod has its own kernel, so it cannot be in the host's "

var exclusions = []exclusion{
	{`NamespaceOption runtime should support HostPID$`, ownKernel + "PID namespace. Refused with the reason."},
	{`NamespaceOption runtime should support HostIpc is true$`, ownKernel + "IPC namespace. Refused with the reason."},
	{`NamespaceOption runtime should support HostNetwork is true$`, ownKernel + "network namespace. Refused with the reason."},
	{`Streaming .* runtime should support portforward in host network$`, ownKernel + "network namespace. Forwarding to a pod's own network is tested by another spec."},
	{`Mount Propagation .* mount with 'rshared' `, ownKernel + "mount namespace: a mount made in a container cannot appear on the host. Refused with the reason. Mounts made on the host do appear in the container ('rslave'), and propagation between containers and volumes of a pod works, inside its guest."},
}
