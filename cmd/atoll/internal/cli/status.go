package cli

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/openatoll/atoll/cmd/atoll/internal/cluster"
)

func newStatus(g *globals) *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what runs",
		Long:  `Shows processes, components, nodes and namespaces with their limits, use and pools. Exits with 3 if the cluster is not up.`,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := g.layout()
			if err != nil {
				return err
			}
			st, err := cluster.GetStatus(cmd.Context(), l)
			if err != nil {
				return err
			}
			err = out.print(cmd.OutOrStdout(), st, func(w io.Writer) error { return statusTable(w, st) })
			if err == nil && !st.Up() {
				err = errFound
			}
			return err
		},
	}
	out.add(cmd)
	return cmd
}

func statusTable(w io.Writer, st cluster.Status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "data\t%s\n", st.DataDir)
	fmt.Fprintf(t, "server\t%s\n", st.Server)
	fmt.Fprintf(t, "kubeconfig\t%s\n", st.Kubeconfig)
	network := "the host's"
	if st.Isolated {
		network = "isolated, namespace " + st.Namespace
	}
	fmt.Fprintf(t, "network\t%s\n", network)
	fmt.Fprintf(t, "version\t%s\n", st.Version)
	fmt.Fprintln(t, "\nPROCESS\tSTATE\tPID\tSINCE\tLOG")
	for _, p := range st.Processes {
		state, pid, since := "stopped", "-", "-"
		if p.Running {
			state, pid, since = "running", fmt.Sprint(p.PID), p.Since.Local().Format(time.DateTime)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", p.Name, state, pid, since, p.Log)
	}
	if len(st.Components) > 0 {
		fmt.Fprintln(t, "\nCOMPONENT\tHEALTH\tMESSAGE")
		for _, c := range st.Components {
			health := "ok"
			if !c.Healthy {
				health = "UNWELL"
			}
			fmt.Fprintf(t, "%s\t%s\t%s\n", c.Name, health, c.Message)
		}
	}
	if len(st.Nodes) > 0 {
		fmt.Fprintln(t, "\nNODE\tREADY\tADDRESS\tKUBELET\tRUNTIME\tACCELERATOR\tPODS")
		for _, n := range st.Nodes {
			ready := "yes"
			if !n.Ready {
				ready = "no (" + n.Message + ")"
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%d running of %d\n", n.Name, ready, n.Address, n.KubeletVersion, n.Runtime, orDash(n.Accelerator), n.RunningPods, n.Pods)
		}
	}
	namespaceTable(t, st.Namespaces)
	for _, e := range st.Errors {
		fmt.Fprintf(t, "error\t%s\n", e)
	}
	return t.Flush()
}

func namespaceTable(w io.Writer, all []cluster.Namespace) {
	if len(all) == 0 {
		return
	}
	fmt.Fprintln(w, "\nNAMESPACE\tSYNCED\tCPU\tMEMORY\tPOOLS")
	for _, n := range all {
		synced := "yes"
		if !n.Synced {
			synced = "no (" + n.Reason + ")"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", n.Name, synced, shareText(n.CPU), shareText(n.Memory), orDash(strings.Join(n.Pools, ",")))
	}
}

func shareText(s cluster.Share) string {
	switch {
	case s.Limit == nil && s.Used == nil:
		return "-"
	case s.Limit == nil:
		return s.Used.String()
	case s.Used == nil:
		return "? of " + s.Limit.String()
	}
	return s.Used.String() + " of " + s.Limit.String()
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
