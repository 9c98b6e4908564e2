package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime/debug"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/openatoll/atoll/cmd/atoll/internal/cluster"
	"github.com/openatoll/atoll/cmd/atoll/internal/leftovers"
	"github.com/openatoll/atoll/cmd/atoll/internal/preflight"
	"github.com/openatoll/atoll/internal/version"
	"github.com/openatoll/atoll/supervisor/controlplane"
)

func newDown(g *globals) *cobra.Command {
	var purge bool
	cmd := &cobra.Command{
		Use:   "down",
		Short: "Stop the cluster and leave nothing behind but its data",
		Long: `Stops the node agent, every pod VM and the control plane, and removes network
namespaces, links, tables, cgroups and mounts. The data stays, and the next
up goes on with it; with --purge it is erased.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := needRoot("down"); err != nil {
				return err
			}
			l, err := g.layout()
			if err != nil {
				return err
			}
			assets, err := cluster.FindAssets("")
			if err != nil {
				return err
			}
			unlock, err := cluster.Lock(l)
			if err != nil {
				return err
			}
			defer unlock()
			return cluster.Down(cmd.Context(), l, cluster.DownOptions{
				Purge: purge, Assets: assets, Progress: progress(cmd.OutOrStdout()),
			})
		},
	}
	cmd.Flags().BoolVar(&purge, "purge", false, "erase the data too")
	return cmd
}

func newCheck(g *globals) *cobra.Command {
	var isolated, measure, write bool
	var node, guest string
	var out output
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check whether this host can run Atoll",
		Long: `Runs the checks that up runs first, and changes nothing. Each failure comes with
its cure. Exits with 3 if something failed.

With --overhead it measures instead, in a minute or two, what a pod VM costs this
host beyond what its containers use: the part that is fixed and the part that
grows with memory, and how much of its RAM a guest keeps. A cluster need not run.
With --write the result becomes the overhead of RuntimeClass atoll, which pods
have from then on, and the scheduler and quotas count.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := g.layout()
			if err != nil {
				return err
			}
			assets, err := cluster.FindAssets(guest)
			if err != nil {
				return err
			}
			if write && !measure {
				return usageError{errors.New("--write is for --overhead")}
			}
			if measure {
				return checkOverhead(cmd, l, assets.Guest, write, out)
			}
			s, err := cluster.ReadState(l)
			if err != nil && !errdefs.IsNotFound(err) && !os.IsPermission(err) {
				return err
			}
			if cmd.Flags().Changed("isolated") {
				s.Isolated = isolated
			}
			if node != "" {
				s.Node = node
			}
			findings := preflight.Run(cmd.Context(), host(l, s, assets).Checks())
			err = out.print(cmd.OutOrStdout(), findings, func(w io.Writer) error { return findingsTable(w, findings) })
			if err == nil && preflight.Err(findings) != nil {
				err = errFound
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&isolated, "isolated", false, "check for `atoll up --isolated`")
	cmd.Flags().BoolVar(&measure, "overhead", false, "measure what a pod VM costs")
	cmd.Flags().BoolVar(&write, "write", false, "with --overhead: write it into the cluster's RuntimeClass")
	cmd.Flags().StringVar(&node, "node-name", "", "check for this node name")
	cmd.Flags().StringVar(&guest, "guest", "", "directory of the pod VMs' kernel and initramfs (default: as built)")
	out.add(cmd)
	return cmd
}

func findingsTable(w io.Writer, findings []preflight.Finding) error {
	for _, f := range findings {
		if _, err := fmt.Fprintf(w, "%-4s  %-15s %s\n", level(f.Level), f.Check, f.Detail); err != nil {
			return err
		}
		if f.Cure != "" {
			fmt.Fprintf(w, "%-4s  %-15s cure: %s\n", "", "", f.Cure)
		}
	}
	return nil
}

func newEnter(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "enter [-- COMMAND [ARG...]]",
		Short: "Run a command (default: a shell) inside the cluster's network",
		Long: `Runs a command in the cluster's network namespace, with KUBECONFIG set and Atoll's
binaries first in PATH. The exit code is the command's.`,
		Example: "  atoll enter -- kubectl get pods -A\n  atoll enter -- curl http://198.19.0.2",
		Args:    cobra.ArbitraryArgs,
		RunE: func(_ *cobra.Command, args []string) error {
			l, err := g.layout()
			if err != nil {
				return err
			}
			assets, err := cluster.FindAssets("")
			if err != nil {
				return err
			}
			if len(args) == 0 {
				shell := os.Getenv("SHELL")
				if shell == "" {
					shell = "/bin/sh"
				}
				args = []string{shell}
			}
			return cluster.Enter(l, assets, args)
		},
	}
}

func newLogs(g *globals) *cobra.Command {
	var follow bool
	var lines int
	cmd := &cobra.Command{
		Use:       "logs [supervisor|spherelet|audit]",
		Short:     "Show a component's log",
		Args:      cobra.MatchAll(cobra.MaximumNArgs(1), cobra.OnlyValidArgs),
		ValidArgs: []string{cluster.Supervisor, cluster.Spherelet, "audit"},
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := g.layout()
			if err != nil {
				return err
			}
			name := cluster.Supervisor
			if len(args) == 1 {
				name = args[0]
			}
			file := l.Log(name)
			if _, err := os.Stat(file); err != nil {
				return fmt.Errorf("%s has no log yet: %w", name, err)
			}
			argv := []string{"-n", fmt.Sprint(lines)}
			if follow {
				argv = append(argv, "-F")
			}
			tail := exec.CommandContext(cmd.Context(), "tail", append(argv, "--", file)...)
			tail.Stdout, tail.Stderr = cmd.OutOrStdout(), cmd.ErrOrStderr()
			if err := tail.Run(); err != nil && cmd.Context().Err() == nil {
				return fmt.Errorf("read %s: %w", file, err)
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what is logged from now on")
	cmd.Flags().IntVarP(&lines, "lines", "n", 50, "how many of the last lines to show")
	return cmd
}

func newBackup(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "backup FILE",
		Short: "Write the control plane's state to a file while it runs",
		Long: `Writes etcd's state and the cluster's keys to one file of mode 0600. Whoever has
the file has the cluster: keep it as you keep its keys. Volumes are not in it.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := needRoot("backup"); err != nil {
				return err
			}
			l, err := g.layout()
			if err != nil {
				return err
			}
			s, err := cluster.ReadState(l)
			if err != nil {
				return err
			}
			h, err := controlplane.Backup(cmd.Context(), cluster.ControlPlaneConfig(l, s), args[0])
			if err != nil {
				return err
			}
			return printBackup(cmd.OutOrStdout(), "written to "+args[0], h)
		},
	}
}

func printBackup(w io.Writer, what string, h controlplane.BackupHeader) error {
	var size int64
	for _, f := range h.Files {
		size += f.Size
	}
	_, err := fmt.Fprintf(w, "%s: revision %d of %s, %.1f MiB\n", what, h.Revision, h.Created.Format(time.RFC3339), float64(size)/(1<<20))
	return err
}

func newRestore(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "restore FILE",
		Short: "Fill an empty data directory from a backup",
		Long: `Restores a backup into a data directory that has no cluster in it (atoll down
--purge erases one). The next up starts it.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := needRoot("restore"); err != nil {
				return err
			}
			l, err := g.layout()
			if err != nil {
				return err
			}
			unlock, err := cluster.Lock(l)
			if err != nil {
				return err
			}
			defer unlock()
			if running := cluster.Running(l); len(running) > 0 {
				return fmt.Errorf("the cluster in %s runs; `atoll down --purge` first: %w", l.DataDir(), errdefs.ErrFailedPrecondition)
			}
			h, err := cluster.Restore(cmd.Context(), l, args[0])
			if err != nil {
				return err
			}
			return printBackup(cmd.OutOrStdout(), "restored into "+l.DataDir(), h)
		},
	}
}

func newLeftovers(g *globals) *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use:   "leftovers",
		Short: "List what Atoll has on this host: nothing, once clusters are down",
		Long: `Lists processes, links, network namespaces, mounts, nftables tables, loop devices,
cgroups and run directories that carry Atoll's marks. With --data-dir only that
cluster's. Exits with 3 if there are any.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var scope leftovers.Scope
			if g.explicit {
				l, err := g.layout()
				if err != nil {
					return err
				}
				scope = cluster.Scope(l)
			}
			found, err := leftovers.Find(scope)
			if err != nil {
				return err
			}
			if found == nil {
				found = []leftovers.Leftover{}
			}
			err = out.print(cmd.OutOrStdout(), found, func(w io.Writer) error { return leftoversTable(w, found) })
			if err == nil && len(found) > 0 {
				err = errFound
			}
			return err
		},
	}
	out.add(cmd)
	return cmd
}

func leftoversTable(w io.Writer, found []leftovers.Leftover) error {
	if len(found) == 0 {
		_, err := fmt.Fprintln(w, "nothing is left")
		return err
	}
	for _, f := range found {
		if _, err := fmt.Fprintf(w, "%-10s %-24s %s\n", f.Kind, f.Name, f.Detail); err != nil {
			return err
		}
	}
	return nil
}

func newVersion() *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Show the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := struct {
				Atoll      string `json:"atoll"`
				Kubernetes string `json:"kubernetes"`
				Go         string `json:"go"`
			}{version.Version, controlplane.KubernetesVersion, goVersion()}
			return out.print(cmd.OutOrStdout(), v, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "atoll %s, Kubernetes %s, %s\n", v.Atoll, v.Kubernetes, v.Go)
				return err
			})
		},
	}
	out.add(cmd)
	return cmd
}

func goVersion() string {
	if b, ok := debug.ReadBuildInfo(); ok {
		return b.GoVersion
	}
	return "unknown"
}

func newMan() *cobra.Command {
	return &cobra.Command{
		Use:   "man DIR",
		Short: "Write the manual pages into a directory",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true
			// A fixed date: the same source gives the same pages.
			date := time.Unix(0, 0).UTC()
			return doc.GenManTree(root, &doc.GenManHeader{Title: "ATOLL", Section: "8", Source: "Atoll " + version.Version, Manual: "Atoll", Date: &date}, args[0])
		},
	}
}

func newSupervisor(g *globals) *cobra.Command {
	var fd int
	var images string
	cmd := &cobra.Command{
		Use:    cluster.Supervisor,
		Short:  "Run the control plane (started by up)",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := g.layout()
			if err != nil {
				return err
			}
			reporter := cluster.NewReporter(fd)
			err = cluster.Supervise(cmd.Context(), l, images, reporter)
			if cmd.Context().Err() != nil { // asked to end: that is a success
				return nil
			}
			if err != nil {
				reporter.Fail(err)
			}
			return err
		},
	}
	cmd.Flags().IntVar(&fd, "progress-fd", 0, "descriptor to report phases on")
	cmd.Flags().StringVar(&images, "images", "", "demo images for the embedded registry")
	return cmd
}
