// Package spherelet makes one host a Kubernetes node whose pods are virtual
// machines. It runs upstream's kubelet in this process, reaches the runtime
// over the CRI socket like any kubelet, and injects what is different here:
// the host's facts (machine), a small container manager, volume plug-ins that
// leave emptyDir to the guest (volumes), and an admission that refuses what
// cannot be honoured (admission) and sends the runtime a hint with the VM's
// size (resources) long before the sandbox is asked for.
//
// Every line where upstream must be helped is named where it is done.
package spherelet
