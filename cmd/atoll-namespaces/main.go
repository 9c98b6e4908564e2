// Command atoll-namespaces keeps namespaces in step with vSphere: the
// controllers that the supervisor has in it, in a process of their own.
//
//	atoll-namespaces --kubeconfig FILE [--metrics-address 127.0.0.1:PORT]
//
// It is for a cluster that was brought up by `atoll up --namespaces-apart`,
// whose kubeconfig for it is DATA-DIR/pki/kubeconfig/namespaces.kubeconfig.
// Beside a supervisor that has them too it stands by. Of several such processes one
// works, and another takes over when that ends.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/component-base/metrics/legacyregistry"

	"github.com/openatoll/atoll/internal/gcpace"
	"github.com/openatoll/atoll/supervisor/namespaces"
)

func main() {
	kubeconfig, address, err := parse(os.Args[1:])
	if err != nil {
		os.Exit(2) // which flags has told
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, kubeconfig, address); err != nil {
		fmt.Fprintln(os.Stderr, "atoll-namespaces:", err)
		stop()
		os.Exit(1)
	}
}

// parse does without flag.CommandLine, which has flags of libraries.
func parse(args []string) (kubeconfig, address string, err error) {
	flags := flag.NewFlagSet("atoll-namespaces", flag.ContinueOnError)
	flags.StringVar(&kubeconfig, "kubeconfig", "", "`file` with which the API server is reached, as user atoll:namespaces")
	flags.StringVar(&address, "metrics-address", "", "loopback `address:port` of /metrics (default: none)")
	err = flags.Parse(args)
	return kubeconfig, address, err
}

// run returns nil when ctx ends.
func run(ctx context.Context, kubeconfig, address string) error {
	go gcpace.Run(ctx, 50, 200) // as the supervisor
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	controller, err := newController(kubeconfig)
	if err != nil {
		return err
	}
	metrics, err := listen(address)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if metrics != nil {
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", legacyregistry.Handler())
		server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
		defer server.Close()
		go func() { cancel(fmt.Errorf("serve metrics on %s: %w", address, server.Serve(metrics))) }()
	}
	err = controller.Run(ctx)
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		err = errors.Join(err, cause)
	}
	return err
}

func newController(kubeconfig string) (*namespaces.Controller, error) {
	if kubeconfig == "" {
		return nil, fmt.Errorf("--kubeconfig: a file is wanted, as DATA-DIR/pki/kubeconfig/namespaces.kubeconfig: %w", errdefs.ErrInvalidArgument)
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	cfg.QPS = -1 // the API server's own fairness is enough
	cfg.UserAgent = "atoll/namespaces"
	file, err := filepath.Abs(kubeconfig)
	if err != nil {
		return nil, err
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	// Nothing keeps two from being started with one file.
	identity := fmt.Sprintf("%s:%s:%d", host, file, os.Getpid())
	return namespaces.New(namespaces.Options{Config: cfg, Identity: identity})
}

// listen on loopback alone: there is neither TLS nor a login. No address is no
// listener.
func listen(address string) (net.Listener, error) {
	if address == "" {
		return nil, nil
	}
	at, err := netip.ParseAddrPort(address)
	if err != nil || !at.Addr().IsLoopback() {
		return nil, fmt.Errorf("--metrics-address %s: an address of loopback and a port are wanted, as 127.0.0.1:9470: %w", address, errdefs.ErrInvalidArgument)
	}
	return net.Listen("tcp", address)
}
