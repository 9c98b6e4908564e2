// Command kubectl-atoll is a plug-in of kubectl's: with it on PATH, `kubectl
// atoll login` signs a vSphere user in at a supervisor and `kubectl atoll
// logout` signs him out.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/openatoll/atoll/internal/version"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// A usageError is a mistake on the command line.
type usageError struct{ error }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string, in io.Reader, out, errs io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errs)
	err := root.ExecuteContext(ctx)
	var usage usageError
	switch {
	case err == nil:
		return exitOK
	case ctx.Err() != nil:
		fmt.Fprintln(errs, "kubectl atoll: interrupted")
		return exitFailed
	case errors.As(err, &usage):
		fmt.Fprintln(errs, "kubectl atoll:", sentence(err))
		return exitUsage
	}
	fmt.Fprintln(errs, "kubectl atoll:", sentence(err))
	return exitFailed
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:         "kubectl-atoll",
		Annotations: map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl atoll"},
		Short:       "Sign in at a supervisor as a user of vSphere",
		Long: `Signs users of vSphere's single sign-on in at a supervisor, and keeps a context for
each namespace that they may use in the kubeconfig.

  kubectl atoll login --server supervisor.example.com --vsphere-username ada@vsphere.local
  kubectl config use-context shop
  kubectl atoll logout`,
		Version:       version.Version,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see `%s --help`", err, cmd.CommandPath())}
	})
	root.AddCommand(newLogin(), newLogout(), newMan())
	return root
}

// sentence is an error without the names of the classes that code tells it by.
func sentence(err error) string {
	s := err.Error()
	for _, class := range []error{
		errdefs.ErrUnauthenticated, errdefs.ErrResourceExhausted, errdefs.ErrPermissionDenied, errdefs.ErrUnavailable,
		errdefs.ErrInvalidArgument, errdefs.ErrNotFound, errdefs.ErrAlreadyExists, errdefs.ErrInternal,
	} {
		s = strings.TrimSuffix(s, ": "+class.Error())
	}
	return s
}
