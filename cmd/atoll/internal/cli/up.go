package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/openatoll/atoll/cmd/atoll/internal/cluster"
	"github.com/openatoll/atoll/cmd/atoll/internal/preflight"
	"github.com/openatoll/atoll/supervisor/controlplane"
	"github.com/openatoll/atoll/supervisor/login"
	"github.com/openatoll/atoll/vmpod/qemu"
)

func newUp(g *globals) *cobra.Command {
	var isolated, foreground, apart bool
	var node, guest string
	var lifetime time.Duration
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Bring the cluster up",
		Long: `Checks this host, then starts the control plane and the node agent, and returns
when pods can be run. Run again, it finds what runs and starts what has died.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := needRoot("up"); err != nil {
				return err
			}
			l, err := g.layout()
			if err != nil {
				return err
			}
			assets, err := cluster.FindAssets(guest)
			if err != nil {
				return err
			}
			opt := cluster.Options{Node: node, Assets: assets}
			if cmd.Flags().Changed("isolated") {
				opt.Isolated = &isolated
			}
			if cmd.Flags().Changed("namespaces-apart") {
				opt.NamespacesApart = &apart
			}
			if cmd.Flags().Changed("token-lifetime") {
				opt.TokenLifetime = &lifetime
			}
			return runUp(cmd.Context(), cmd.OutOrStdout(), l, opt, foreground)
		},
	}
	f := cmd.Flags()
	f.DurationVar(&lifetime, "token-lifetime", login.DefaultTokenLifetime, "how long a login by `kubectl atoll login` is good, 5m to 24h")
	f.BoolVar(&isolated, "isolated", false, "put everything into a network namespace of its own, without a route out")
	f.BoolVar(&foreground, "foreground", false, "stay, and take the cluster down at Ctrl-C")
	f.BoolVar(&apart, "namespaces-apart", false, "leave keeping namespaces in step with vSphere to atoll-namespaces, a program of its own")
	f.StringVar(&node, "node-name", "", "the node's name (default: this host's)")
	f.StringVar(&guest, "guest", "", "directory of the pod VMs' kernel and initramfs (default: as built)")
	return cmd
}

func runUp(ctx context.Context, w io.Writer, l cluster.Layout, opt cluster.Options, foreground bool) error {
	unlock, err := cluster.Lock(l)
	if err != nil {
		return err
	}
	began := time.Now()
	opt.Progress = progress(w)
	opt.Preflight = func(ctx context.Context, l cluster.Layout, s cluster.State) error {
		findings := preflight.Run(ctx, host(l, s, opt.Assets).Checks())
		for _, f := range findings {
			if f.Level == preflight.Warn {
				fmt.Fprintf(w, "  warning: %s: %s\n           %s\n", f.Check, f.Detail, f.Cure)
			}
		}
		return preflight.Err(findings)
	}
	res, err := cluster.Up(ctx, l, opt)
	unlock()
	if err != nil {
		return err
	}
	printNext(w, l, res, time.Since(began))
	if !foreground {
		return nil
	}
	return stay(ctx, w, l, opt)
}

// Repairs that stay makes before it gives up: more than these within the
// window is a component that cannot live.
const (
	maxRepairs   = 5
	repairWindow = 10 * time.Minute
)

// stay waits for Ctrl-C and takes the cluster down. A component that dies is
// started again: pod VMs live on without it.
func stay(ctx context.Context, w io.Writer, l cluster.Layout, opt cluster.Options) error {
	fmt.Fprintln(w, "\nCtrl-C takes the cluster down.")
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady) // where systemd started us
	var failure error
	for repairs := []time.Time{}; ; {
		died := cluster.Watch(ctx, l)
		if ctx.Err() != nil {
			break
		}
		repairs = append(repairs, time.Now())
		if n := len(repairs) - maxRepairs; n > 0 && time.Since(repairs[n-1]) < repairWindow {
			failure = died
			break
		}
		fmt.Fprintf(w, "%v; starting it again\n", died)
		if failure = repair(ctx, l, opt); failure != nil {
			break
		}
	}
	fmt.Fprintln(w, "taking the cluster down")
	_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
	// A second Ctrl-C must not leave half of it behind.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Minute)
	defer cancel()
	unlock, err := cluster.Lock(l)
	if err != nil {
		return errors.Join(failure, err)
	}
	defer unlock()
	return errors.Join(failure, cluster.Down(ctx, l, cluster.DownOptions{Assets: opt.Assets, Progress: progress(w)}))
}

func repair(ctx context.Context, l cluster.Layout, opt cluster.Options) error {
	unlock, err := cluster.Lock(l)
	if err != nil {
		return err
	}
	defer unlock()
	_, err = cluster.Up(ctx, l, opt)
	if ctx.Err() != nil { // Ctrl-C meanwhile is no failure
		return nil
	}
	return err
}

// progress prints a line a step.
func progress(w io.Writer) func(cluster.Step) {
	return func(s cluster.Step) {
		fmt.Fprintf(w, "  %-20s %6.1fs  %s\n", s.What, s.Took.Seconds(), s.Detail)
	}
}

func printNext(w io.Writer, l cluster.Layout, res cluster.Result, took time.Duration) {
	state := fmt.Sprintf("The cluster is up after %.1f s.", took.Seconds())
	if res.AlreadyUp {
		state = "The cluster was up already."
	}
	flag := ""
	if l.DataDir() != cluster.DefaultDataDir {
		flag = " --data-dir " + l.DataDir()
	}
	fmt.Fprintf(w, "\n%s Next:\n\n", state)
	if !res.State.Isolated {
		fmt.Fprintf(w, "  export KUBECONFIG=%s\n  kubectl run web --image=atoll.local/web\n\nor, without kubectl of your own:\n\n", l.Kubeconfig())
	}
	atoll := "atoll"
	if strings.Contains(os.Args[0], "/") {
		atoll = os.Args[0] // as it was typed: not in PATH
	}
	fmt.Fprintf(w, "  %s enter%s -- kubectl run web --image=atoll.local/web\n", atoll, flag)
	fmt.Fprintf(w, "  %s enter%s -- kubectl get pods\n  %s enter%s -- govc tree\n  %s down%s\n", atoll, flag, atoll, flag, atoll, flag)
	c := cluster.ControlPlaneConfig(l, res.State)
	fmt.Fprintf(w, "\nvCenter, for govc of your own:\n\n  export GOVC_URL=https://%s/sdk GOVC_USERNAME=%s GOVC_PASSWORD=$(cat %s) GOVC_TLS_CA_CERTS=%s\n",
		c.VCenterAddress(), c.VCenterUser(), c.VCenterPasswordFile(), c.ClientCAFile())
}

// host is what this cluster asks of the machine.
func host(l cluster.Layout, s cluster.State, a cluster.Assets) preflight.Host {
	cfg := cluster.ControlPlaneConfig(l, s)
	return preflight.Host{
		DataDir:   l.DataDir(),
		Isolated:  s.Isolated,
		Running:   len(cluster.Running(l)) > 0,
		Spherelet: a.Spherelet(),
		Guest:     a.Guest,
		Images:    a.Images,
		NodeName: func() (string, error) {
			if s.Node != "" {
				return s.Node, nil
			}
			return cluster.DefaultNodeName()
		},
		CheckDataDir: func() error { return controlplane.CheckDataDir(l.DataDir()) },
		Ports:        func() []error { return controlplane.CheckPorts(cfg) },
		KVM: func(ctx context.Context) (bool, string) {
			return probeKVM(ctx, l, s)
		},
		Ranges: []netip.Prefix{cluster.NodeRange(cfg), cfg.ServiceCIDR, cfg.PodCIDR},
		Link:   cluster.NodeLink,
	}
}

// probeKVM keeps what it finds with the node's data, if there is any yet.
func probeKVM(ctx context.Context, l cluster.Layout, s cluster.State) (bool, string) {
	dir := l.NodeDir(s.Node)
	if _, err := os.Stat(dir); err != nil || s.Node == "" {
		if dir, err = os.MkdirTemp("", "atoll-kvm-"); err != nil {
			return false, err.Error()
		}
		defer os.RemoveAll(dir)
	}
	r := qemu.ProbeKVM(ctx, dir)
	return r.Usable, r.Reason
}
