// Command atoll brings a Kubernetes cluster up on this machine in which every
// pod is its own virtual machine.
package main

import (
	"os"

	"github.com/openatoll/atoll/cmd/atoll/internal/cli"
	"github.com/openatoll/atoll/vmpod/qemu"
)

func main() {
	qemu.RunProbeChild() // does not return in the child of a KVM probe
	os.Exit(cli.Main(os.Args[1:]))
}
