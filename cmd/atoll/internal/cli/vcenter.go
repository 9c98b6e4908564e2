package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/openatoll/atoll/cmd/atoll/internal/cluster"
	"github.com/openatoll/atoll/supervisor/controlplane"
)

func newVCenter(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "vcenter",
		Short: "Look after the embedded vCenter",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	user := &cobra.Command{
		Use:   "user",
		Short: "Users of the embedded vCenter, who sign in with kubectl atoll login",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	user.AddCommand(newUserSet(g), newUserRemove(g), newUserList(g))
	cmd.AddCommand(user)
	return cmd
}

// running is the configuration of the cluster's control plane.
func (g *globals) running(what string) (controlplane.Config, error) {
	if err := needRoot(what); err != nil {
		return controlplane.Config{}, err
	}
	l, err := g.layout()
	if err != nil {
		return controlplane.Config{}, err
	}
	s, err := cluster.ReadState(l)
	if err != nil {
		return controlplane.Config{}, err
	}
	return cluster.ControlPlaneConfig(l, s), nil
}

func newUserSet(g *globals) *cobra.Command {
	var groups []string
	cmd := &cobra.Command{
		Use:   "set NAME",
		Short: "Make a user, or change the password; it is typed, or read from standard input",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := g.running("vcenter user set")
			if err != nil {
				return err
			}
			password, err := readPassword(cmd.InOrStdin(), cmd.ErrOrStderr(), args[0])
			if err != nil {
				return err
			}
			return controlplane.SetVCenterUser(cmd.Context(), cfg, controlplane.VCenterUser{Name: args[0], Groups: groups}, password)
		},
	}
	cmd.Flags().StringSliceVar(&groups, "group", nil, "a group to become a member of; made if it is not there")
	return cmd
}

// maxPassword is what the login server takes, in bytes.
const maxPassword = 1024

// readPassword never takes one from the command line, which every user of the
// host can see.
func readPassword(in io.Reader, out io.Writer, user string) (string, error) {
	if f, ok := in.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		fmt.Fprintf(out, "New password of %s: ", user)
		b, err := term.ReadPassword(int(f.Fd()))
		fmt.Fprintln(out)
		if err != nil {
			return "", fmt.Errorf("read the password: %w", err)
		}
		in = strings.NewReader(string(b))
	}
	b, err := io.ReadAll(io.LimitReader(in, maxPassword+2))
	if err != nil {
		return "", fmt.Errorf("read the password: %w", err)
	}
	password := strings.TrimRight(string(b), "\r\n")
	if password == "" || len(password) > maxPassword {
		return "", usageError{errors.New("the password is empty, or longer than 1024 bytes")}
	}
	return password, nil
}

func newUserRemove(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "rm NAME",
		Short: "Remove a user; a login that is open stays good until it expires",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := g.running("vcenter user rm")
			if err != nil {
				return err
			}
			return controlplane.RemoveVCenterUser(cmd.Context(), cfg, args[0])
		},
	}
}

func newUserList(g *globals) *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List users and their groups",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := g.running("vcenter user ls")
			if err != nil {
				return err
			}
			users, err := controlplane.VCenterUsers(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			return out.print(cmd.OutOrStdout(), users, func(w io.Writer) error {
				t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
				fmt.Fprintln(t, "USER\tGROUPS")
				for _, u := range users {
					fmt.Fprintf(t, "%s\t%s\n", u.Name, strings.Join(u.Groups, ","))
				}
				return t.Flush()
			})
		},
	}
	out.add(cmd)
	return cmd
}
