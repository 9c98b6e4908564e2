// Command agnhost is what the storage suite runs of upstream's program of that
// name: all of it would need modules that nothing else here does.
package main

import (
	"os"

	"github.com/spf13/cobra"

	"k8s.io/component-base/cli"
	"k8s.io/kubernetes/test/images/agnhost/mounttest"
	"k8s.io/kubernetes/test/images/agnhost/pause"
)

func main() {
	root := &cobra.Command{Use: "app"}
	root.AddCommand(mounttest.CmdMounttest, pause.CmdPause)
	os.Exit(cli.Run(root))
}
