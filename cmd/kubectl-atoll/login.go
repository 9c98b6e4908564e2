package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
	"golang.org/x/term"

	"github.com/openatoll/atoll/internal/version"
	"github.com/openatoll/atoll/supervisor/login/client"
	"github.com/openatoll/atoll/supervisor/login/loginapi"
)

// Where name and password may come from, beside the terminal: never from the
// command line, which every user of the host can see.
const (
	usernameEnv = "KUBECTL_ATOLL_USERNAME"
	passwordEnv = "KUBECTL_ATOLL_PASSWORD" //nolint:gosec // a name
)

func newLogin() *cobra.Command {
	var o client.Options
	var stdin bool
	cmd := &cobra.Command{
		Use:   "login --server HOST[:PORT]",
		Short: "Sign in, and get a context for each namespace",
		Long: fmt.Sprintf(`Signs in with a user name and password of vSphere's single sign-on, and puts into the
kubeconfig a context for the supervisor and one for each namespace that the user
may use; what else is there stays as it is. Signing in again renews the token and
brings the contexts up to date.

The password is asked for on the terminal, or taken from $%s or, with
--password-stdin, from standard input.

The server's certificate must be signed by the authority in --ca-file; without it,
by the one that an earlier login has kept, or by one that this host trusts.`, passwordEnv),
		Example: `  kubectl atoll login --server 198.18.0.1 --ca-file /var/lib/atoll/pki/ca.crt -u ada@vsphere.local
  pass vsphere | kubectl atoll login --server supervisor.example.com -u ada@corp.example --password-stdin`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Server == "" {
				return usageError{errors.New("which supervisor? give --server HOST")}
			}
			if o.CAFile != "" && o.Insecure {
				return usageError{errors.New("--ca-file checks the certificate, --insecure-skip-tls-verify does not: give one of them")}
			}
			t := terminal{in: cmd.InOrStdin(), out: cmd.ErrOrStderr()}
			if o.User == "" {
				o.User = os.Getenv(usernameEnv)
			}
			if o.User == "" {
				user, err := t.line(cmd.Context(), "User name (NAME@DOMAIN): ")
				if err != nil {
					return usageError{fmt.Errorf("no user name: give --vsphere-username: %w", err)}
				}
				o.User = user
			}
			o.Password = func() (string, error) { return t.password(cmd.Context(), o.User, stdin) }
			r, err := client.Login(cmd.Context(), o)
			if err != nil {
				return err
			}
			printLogin(cmd.OutOrStdout(), cmd.ErrOrStderr(), r)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Server, "server", "", fmt.Sprintf("the supervisor's host, and the port of its logins if it is not %d", loginapi.DefaultPort))
	f.StringVarP(&o.User, "vsphere-username", "u", "", "NAME@DOMAIN; $"+usernameEnv+" sets the default")
	f.BoolVar(&stdin, "password-stdin", false, "read the password from standard input")
	f.StringVar(&o.CAFile, "ca-file", "", "certificate `file` (PEM) of the authority that signed the server's")
	f.BoolVar(&o.Insecure, "insecure-skip-tls-verify", false, "take the server at its word this once: whoever is between can read the password")
	f.StringVarP(&o.Namespace, "namespace", "n", "", "make this namespace the current context")
	addKubeconfig(cmd, &o.Kubeconfig)
	return cmd
}

func addKubeconfig(cmd *cobra.Command, path *string) {
	cmd.Flags().StringVar(path, "kubeconfig", "", "the kubeconfig `file` (default: as kubectl has it)")
	_ = cmd.MarkFlagFilename("kubeconfig")
}

func printLogin(out, errs io.Writer, r client.Result) {
	if r.Fingerprint != "" {
		fmt.Fprintf(errs, "Warning: the certificate of %s was not checked. The kubeconfig now has the authority that it named;\ncompare its SHA-256 with the supervisor's pki/ca.crt: %s\n", r.Server, r.Fingerprint)
	}
	if r.Warning != "" {
		fmt.Fprintf(errs, "Warning: %s\n", r.Warning)
	}
	fmt.Fprintf(out, "Signed in at %s as %s, until %s.\n\nYou have these contexts:\n", r.Server, r.User, r.Expires.Local().Format(time.DateTime))
	for _, c := range r.Contexts {
		mark := " "
		if c == r.Current {
			mark = "*"
		}
		fmt.Fprintf(out, " %s %s\n", mark, c)
	}
	fmt.Fprintf(out, "\nTo use another one: kubectl config use-context NAME\n")
}

func newLogout() *cobra.Command {
	var server, kubeconfig string
	cmd := &cobra.Command{
		Use:   "logout [--server HOST[:PORT]]",
		Short: "Sign out: give the token back and remove its contexts",
		Long: `Gives the token of a login back, which is good no more a few seconds later, and takes
its contexts out of the kubeconfig. Without --server, of all logins.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			done, err := client.Logout(cmd.Context(), server, kubeconfig)
			var left []error
			for _, l := range done {
				fmt.Fprintf(cmd.OutOrStdout(), "Signed %s out at %s.\n", l.User, l.Server)
				if l.NotRevoked != nil {
					left = append(left, fmt.Errorf("the token of %s at %s is gone from the kubeconfig, but it could not be given back, and is good until %s: %w",
						l.User, l.Server, l.Expires.Local().Format(time.DateTime), l.NotRevoked))
				}
			}
			if err == nil && len(done) == 0 {
				fmt.Fprintln(cmd.OutOrStdout(), "Nobody is signed in.")
			}
			return errors.Join(append(left, err)...)
		},
	}
	cmd.Flags().StringVar(&server, "server", "", "only this supervisor")
	addKubeconfig(cmd, &kubeconfig)
	return cmd
}

func newMan() *cobra.Command {
	return &cobra.Command{
		Use:    "man DIR",
		Short:  "Write the manual pages into a directory",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			root := cmd.Root()
			root.DisableAutoGenTag = true
			// A fixed date: the same source gives the same pages.
			date := time.Unix(0, 0).UTC()
			return doc.GenManTree(root, &doc.GenManHeader{Title: "KUBECTL-ATOLL", Section: "1", Source: "Atoll " + version.Version, Manual: "Atoll", Date: &date}, args[0])
		},
	}
}

// A terminal asks people.
type terminal struct {
	in  io.Reader
	out io.Writer
}

// line reads one, without its end.
func (t terminal) line(ctx context.Context, prompt string) (string, error) {
	f, ok := t.in.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return "", errors.New("standard input is no terminal")
	}
	fmt.Fprint(t.out, prompt)
	s, err := ask(ctx, f, func() (string, error) { return bufio.NewReader(f).ReadString('\n') })
	s = strings.TrimSpace(s)
	if s == "" && err == nil {
		err = errors.New("nothing was typed")
	}
	return s, err
}

// ask returns what read gives, or as soon as ctx ends; the terminal is then as it
// was before.
func ask(ctx context.Context, f *os.File, read func() (string, error)) (string, error) {
	state, err := term.GetState(int(f.Fd()))
	if err != nil {
		return "", err
	}
	type answer struct {
		text string
		err  error
	}
	done := make(chan answer, 1)
	go func() {
		text, err := read()
		done <- answer{text, err}
	}()
	select {
	case a := <-done:
		return a.text, a.err
	case <-ctx.Done():
		return "", errors.Join(ctx.Err(), term.Restore(int(f.Fd()), state))
	}
}

// maxPassword is in bytes; vSphere's end earlier.
const maxPassword = 1024

// password takes it from the environment, from standard input if that is asked
// for, or from the terminal without showing it.
func (t terminal) password(ctx context.Context, user string, stdin bool) (string, error) {
	if stdin {
		b, err := io.ReadAll(io.LimitReader(t.in, maxPassword+3))
		if err != nil {
			return "", fmt.Errorf("read the password: %w", err)
		}
		s := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
		if s == "" || len(s) > maxPassword {
			return "", usageError{fmt.Errorf("--password-stdin: want 1 to %d bytes on standard input, there are %d", maxPassword, len(s))}
		}
		return s, nil
	}
	if s := os.Getenv(passwordEnv); s != "" {
		return s, nil
	}
	f, ok := t.in.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return "", usageError{fmt.Errorf("no password: standard input is no terminal; set $%s or give --password-stdin", passwordEnv)}
	}
	fmt.Fprintf(t.out, "Password of %s: ", user)
	fd := int(f.Fd())
	s, err := ask(ctx, f, func() (string, error) {
		b, err := term.ReadPassword(fd)
		return string(b), err
	})
	fmt.Fprintln(t.out)
	if err != nil {
		return "", fmt.Errorf("read the password: %w", err)
	}
	return s, nil
}
