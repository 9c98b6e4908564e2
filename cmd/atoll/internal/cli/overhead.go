package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/openatoll/atoll/cmd/atoll/internal/cluster"
	"github.com/openatoll/atoll/cmd/atoll/internal/overhead"
	"github.com/openatoll/atoll/supervisor/runtimeclass"
)

// checkOverhead measures what a pod VM costs and, if it is to, writes it into
// the cluster's RuntimeClass.
func checkOverhead(cmd *cobra.Command, l cluster.Layout, guest string, write bool, out output) error {
	ctx := cmd.Context()
	if err := needRoot("check --overhead"); err != nil {
		return err
	}
	r, err := overhead.Measure(ctx, guest, "atoll/"+l.ID()+"-overhead", func(step string) {
		fmt.Fprintln(cmd.ErrOrStderr(), step)
	})
	if err != nil {
		return err
	}
	if err := out.print(cmd.OutOrStdout(), r, r.Table); err != nil {
		return err
	}
	if !write {
		fmt.Fprintf(cmd.ErrOrStderr(), "nothing is written: with --write it becomes the overhead of RuntimeClass %s\n", runtimeclass.Name)
		return nil
	}
	return writeOverhead(ctx, cmd.ErrOrStderr(), l, r)
}

func writeOverhead(ctx context.Context, w io.Writer, l cluster.Layout, r *overhead.Report) error {
	s, err := cluster.ReadState(l)
	if err != nil {
		return err
	}
	client, err := cluster.Client(l, s)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := runtimeclass.Write(ctx, client, r.Measurement); err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "written into RuntimeClass %s: pods that are made from now on have it\n", runtimeclass.Name)
	return err
}

func newMeasureOverhead() *cobra.Command {
	return &cobra.Command{
		Use:    overhead.ChildCommand + " GUEST CGROUP",
		Short:  "Measure pod VMs (started by check --overhead)",
		Hidden: true,
		Args:   cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return overhead.Child(cmd.Context(), args[0], args[1], os.Stdout)
		},
	}
}
