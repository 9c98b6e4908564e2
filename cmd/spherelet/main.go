// Command spherelet makes this host a Kubernetes node whose pods are virtual
// machines.
//
//	spherelet --config FILE           run the node
//	spherelet --config FILE --check   say whether it could run, and end
//	spherelet cri --config FILE       serve the CRI alone, without a kubelet
//	spherelet cleanup --config FILE   remove every VM and all that was made for them
//
// On SIGTERM or SIGINT it ends and leaves the VMs running: the next start
// adopts them. A second signal ends it at once.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	kubeversion "k8s.io/component-base/version"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/version"
	"github.com/openatoll/atoll/spherelet/config"
	"github.com/openatoll/atoll/vmpod/qemu"
)

func main() {
	qemu.RunProbeChild()
	// Upstream's packages put flags of their own there (another --version),
	// and cobra takes them all in.
	pflag.CommandLine = pflag.NewFlagSet(os.Args[0], pflag.ContinueOnError)
	if err := command().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "spherelet:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var file string
	var check bool
	cmd := &cobra.Command{
		Use:           "spherelet --config FILE",
		Short:         "Make this host a Kubernetes node whose pods are virtual machines",
		Version:       fmt.Sprintf("%s (Kubernetes %s)", version.Version, kubeversion.Get().GitVersion),
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(*cobra.Command, []string) error {
			cfg, err := start(file, config.Load, true)
			if err != nil {
				return err
			}
			if check {
				return preflight(context.Background(), cfg, os.Stdout)
			}
			tuneMemory()
			ctx, stop := signals()
			defer stop()
			return run(ctx, cfg)
		},
	}
	cmd.PersistentFlags().StringVar(&file, "config", "", "configuration `file` (kind: SphereletConfiguration)")
	if err := cmd.MarkPersistentFlagRequired("config"); err != nil {
		panic(err)
	}
	cmd.Flags().BoolVar(&check, "check", false, "say whether the node could run here, and end")
	cmd.AddCommand(criCommand(&file), &cobra.Command{
		Use:   "cleanup --config FILE",
		Short: "Remove every VM of the data directory and all that was made for them; images stay",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			cfg, err := start(file, config.LoadRuntime, false)
			if err != nil {
				return err
			}
			ctx, stop := signals()
			defer stop()
			return cleanup(ctx, cfg)
		},
	})
	return cmd
}

// start loads the configuration, sets up logging and enters the network
// namespace.
func start(file string, load func(string) (*v1alpha1.SphereletConfiguration, error), namespaceRequired bool) (*v1alpha1.SphereletConfiguration, error) {
	cfg, err := load(file)
	if err != nil {
		return nil, err
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.LogLevel)); err != nil {
		return nil, err
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})))
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("runs as uid %d: network, disks and VMs need root: %w", os.Geteuid(), errdefs.ErrPermissionDenied)
	}
	return cfg, enterNamespace(cfg, namespaceRequired)
}

// memoryLimit is where the collector starts to work harder (bytes). A node
// with ten pods has about 40 MB of live heap; the rest of the 150 MB that
// spherelet may take is the program itself.
const memoryLimit = 96 << 20

// tuneMemory trades some CPU for memory, unless the environment says
// otherwise.
func tuneMemory() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
}

// signals returns a context that ends with the first SIGTERM or SIGINT; the
// second one ends the process.
func signals() (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}
