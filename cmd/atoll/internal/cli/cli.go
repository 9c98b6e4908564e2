// Package cli is atoll's command line. Its commands read flags and print;
// what they do is in the packages beside it.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/openatoll/atoll/cmd/atoll/internal/cluster"
	"github.com/openatoll/atoll/cmd/atoll/internal/preflight"
)

// Exit codes.
const (
	exitOK      = 0
	exitFailed  = 1
	exitUsage   = 2
	exitChecked = 3 // a check, a status or leftovers found something
)

// errFound ends a command that has printed what it found.
var errFound = errors.New("found")

// A usageError is a mistake on the command line.
type usageError struct{ error }

// Main runs the command line and returns the exit code.
func Main(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	findAdminPrograms()
	root := newRoot()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	var usage usageError
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, errFound):
		return exitChecked
	case errors.As(err, &usage):
		fmt.Fprintf(os.Stderr, "atoll: %v\n", err)
		return exitUsage
	}
	printError(os.Stderr, err, ctx.Err() != nil)
	return exitFailed
}

// findAdminPrograms makes sure that nft and mkfs.ext4 are found: root by
// Debian's plain su keeps the user's PATH, which does not lead to them.
func findAdminPrograms() {
	path := os.Getenv("PATH")
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if !slices.Contains(filepath.SplitList(path), dir) {
			path += string(filepath.ListSeparator) + dir
		}
	}
	_ = os.Setenv("PATH", path) // a valid name and value: it cannot fail
}

func printError(w io.Writer, err error, interrupted bool) {
	if interrupted && errors.Is(err, context.Canceled) {
		fmt.Fprintln(w, "atoll: interrupted; what was started has been stopped")
		return
	}
	fmt.Fprintf(w, "atoll: %s\n", sentence(err))
	var c *cluster.ComponentError
	if errors.As(err, &c) {
		if len(c.Lines) > 0 {
			fmt.Fprintf(w, "\nThe last that %s said (%s):\n", c.Component, c.Log)
		}
		for _, line := range c.Lines {
			fmt.Fprintf(w, "  %s\n", line)
		}
		fmt.Fprintf(w, "\nWhat was started has been stopped. `atoll check` looks for what is wrong with this host; the whole log is in %s\n", c.Log)
	}
}

// sentence is an error without the names of the classes that code tells it
// by.
func sentence(err error) string {
	s := err.Error()
	for _, class := range []error{
		errdefs.ErrNotFound, errdefs.ErrAlreadyExists, errdefs.ErrFailedPrecondition, errdefs.ErrInvalidArgument,
		errdefs.ErrUnavailable, errdefs.ErrPermissionDenied, errdefs.ErrResourceExhausted,
	} {
		s = strings.ReplaceAll(strings.TrimSuffix(s, ": "+class.Error()), ": "+class.Error()+"\n", "\n")
	}
	return s
}

// globals are the flags of every command.
type globals struct {
	dataDir string
	// explicit says that the data directory was asked for.
	explicit bool
}

func (g *globals) layout() (cluster.Layout, error) { return cluster.NewLayout(g.dataDir) }

func newRoot() *cobra.Command {
	g := &globals{}
	root := &cobra.Command{
		Use:   "atoll",
		Short: "Kubernetes in which every pod is its own virtual machine",
		Long: `Atoll runs a Kubernetes cluster on this machine in which every pod is its own
lightweight virtual machine.

  atoll up                       bring the cluster up
  atoll enter -- kubectl get po  work with it
  atoll down                     stop it and leave nothing behind`,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRun: func(cmd *cobra.Command, _ []string) {
			g.explicit = cmd.Flags().Changed("data-dir") || os.Getenv(cluster.DataDirEnv) != ""
		},
	}
	def := cluster.DefaultDataDir
	if dir := os.Getenv(cluster.DataDirEnv); dir != "" {
		def = dir
	}
	root.PersistentFlags().StringVar(&g.dataDir, "data-dir", def, "the cluster's data; $"+cluster.DataDirEnv+" sets the default")
	_ = root.MarkPersistentFlagDirname("data-dir")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see `%s --help`", err, cmd.CommandPath())}
	})
	// Libraries of the control plane put flags of their own into the global
	// set, which cobra shows.
	pflag.CommandLine.VisitAll(func(f *pflag.Flag) { f.Hidden = true })
	root.AddCommand(
		newUp(g), newDown(g), newStatus(g), newCheck(g), newEnter(g), newLogs(g),
		newBackup(g), newRestore(g), newLeftovers(g), newGet(g), newTop(g), newVCenter(g), newVersion(), newMan(), newSupervisor(g), newMeasureOverhead(),
	)
	return root
}

// output is the -o flag of commands whose output is data.
type output struct{ format string }

func (o *output) add(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&o.format, "output", "o", "table", "table or json")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp))
}

// print writes v as JSON, or calls table.
func (o *output) print(w io.Writer, v any, table func(io.Writer) error) error {
	switch o.format {
	case "table":
		return table(w)
	case "json":
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		return enc.Encode(v)
	}
	return usageError{fmt.Errorf("-o %s: want table or json", o.format)}
}

func needRoot(what string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s needs root; run it with sudo: %w", what, errdefs.ErrPermissionDenied)
	}
	return nil
}

// level marks a finding in a table.
func level(l preflight.Level) string {
	switch l {
	case preflight.OK:
		return "ok"
	case preflight.Warn:
		return "WARN"
	default:
		return "FAIL"
	}
}
