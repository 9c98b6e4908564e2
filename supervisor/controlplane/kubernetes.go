package controlplane

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/pflag"
	basecompatibility "k8s.io/component-base/compatibility"
	"k8s.io/component-base/featuregate"
	logsapi "k8s.io/component-base/logs/api/v1"
	_ "k8s.io/component-base/metrics/prometheus/clientgo" // client-go's metrics on the components' /metrics
	_ "k8s.io/component-base/metrics/prometheus/version"
	apiserverapp "k8s.io/kubernetes/cmd/kube-apiserver/app"
	apiserveroptions "k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	kcmapp "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	kcmoptions "k8s.io/kubernetes/cmd/kube-controller-manager/app/options"
	schedulerapp "k8s.io/kubernetes/cmd/kube-scheduler/app"
	scheduleroptions "k8s.io/kubernetes/cmd/kube-scheduler/app/options"
)

// Upstream's components are configured through their flags, which are their
// stable interface; the structs behind them change with every release.

func (c Config) apiServerArgs() []string {
	args := []string{
		"--etcd-servers=" + c.etcdEndpoint(),
		"--bind-address=" + c.Address.String(),
		"--advertise-address=" + c.Address.String(),
		fmt.Sprintf("--secure-port=%d", c.APIPort),
		"--tls-cert-file=" + c.pkiPath("apiserver.crt"),
		"--tls-private-key-file=" + c.pkiPath("apiserver.key"),
		"--client-ca-file=" + c.ClientCAFile(),
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--enable-bootstrap-token-auth=true",
		// Users' tokens (docs/decisions/0016-login.md). No cache of its own beside
		// the ten seconds of the API server's: a logout should not take longer.
		"--authentication-token-webhook-config-file=" + c.componentKubeconfig(tokenReview),
		"--authentication-token-webhook-version=v1",
		"--authentication-token-webhook-cache-ttl=0s",
		"--allow-privileged=true",
		"--kubelet-client-certificate=" + c.pkiPath("apiserver-kubelet-client.crt"),
		"--kubelet-client-key=" + c.pkiPath("apiserver-kubelet-client.key"),
		"--kubelet-certificate-authority=" + c.ClientCAFile(),
		"--kubelet-preferred-address-types=InternalIP,Hostname",
		"--service-account-issuer=https://kubernetes.default.svc." + c.ClusterDomain,
		"--service-account-key-file=" + c.pkiPath("sa.pub"),
		"--service-account-signing-key-file=" + c.pkiPath("sa.key"),
		"--service-cluster-ip-range=" + c.ServiceCIDR.String(),
		"--encryption-provider-config=" + c.encryptionFile(),
		"--requestheader-client-ca-file=" + c.pkiPath("front-proxy-ca.crt"),
		"--requestheader-allowed-names=front-proxy-client",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--requestheader-group-headers=X-Remote-Group",
		"--requestheader-username-headers=X-Remote-User",
		"--proxy-client-cert-file=" + c.pkiPath("front-proxy-client.crt"),
		"--proxy-client-key-file=" + c.pkiPath("front-proxy-client.key"),
		// Aggregated APIs and webhooks are reached at their endpoints: this
		// host need not run kube-proxy.
		"--enable-aggregator-routing=true",
		// Without it open watches hold up a stop until their own time is up.
		"--shutdown-watch-termination-grace-period=500ms",
		"--profiling=false",
	}
	if c.Audit {
		args = append(args,
			"--audit-policy-file="+c.auditPolicyFile(),
			"--audit-log-path="+filepath.Join(c.DataDir, "log", "audit.log"),
			"--audit-log-mode=batch",
			"--audit-log-maxsize=20", "--audit-log-maxbackup=3", // MB, files
		)
	}
	return args
}

func (c Config) controllerManagerArgs() []string {
	kubeconfig := c.componentKubeconfig(controllerManager)
	return []string{
		"--kubeconfig=" + kubeconfig,
		"--authentication-kubeconfig=" + kubeconfig,
		"--authorization-kubeconfig=" + kubeconfig,
		"--bind-address=127.0.0.1",
		fmt.Sprintf("--secure-port=%d", controllerManagerPort),
		"--tls-cert-file=" + c.pkiPath("controller-manager-server.crt"),
		"--tls-private-key-file=" + c.pkiPath("controller-manager-server.key"),
		// A lost lease would end the whole process, and there is one process.
		"--leader-elect=false",
		// The default of 20 costs five seconds of a start.
		"--kube-api-qps=200", "--kube-api-burst=400",
		"--use-service-account-credentials=true",
		"--controllers=*,bootstrapsigner,tokencleaner",
		"--service-account-private-key-file=" + c.pkiPath("sa.key"),
		"--root-ca-file=" + c.ClientCAFile(),
		"--cluster-signing-cert-file=" + c.ClientCAFile(),
		"--cluster-signing-key-file=" + c.pkiPath("ca.key"),
		"--client-ca-file=" + c.ClientCAFile(),
		"--requestheader-client-ca-file=" + c.pkiPath("front-proxy-ca.crt"),
		"--allocate-node-cidrs=true",
		"--cluster-cidr=" + c.PodCIDR.String(),
		fmt.Sprintf("--node-cidr-mask-size=%d", c.NodeMask),
		"--service-cluster-ip-range=" + c.ServiceCIDR.String(),
		// The plug-in prober makes this directory; the default is in /usr.
		"--flex-volume-plugin-dir=" + c.flexVolumeDir(),
		"--profiling=false",
	}
}

func (c Config) flexVolumeDir() string { return filepath.Join(c.socketDir(), "flexvolume") }

func (c Config) schedulerArgs() []string {
	kubeconfig := c.componentKubeconfig(scheduler)
	return []string{
		"--kubeconfig=" + kubeconfig,
		"--authentication-kubeconfig=" + kubeconfig,
		"--authorization-kubeconfig=" + kubeconfig,
		"--bind-address=127.0.0.1",
		fmt.Sprintf("--secure-port=%d", schedulerPort),
		"--tls-cert-file=" + c.pkiPath("scheduler-server.crt"),
		"--tls-private-key-file=" + c.pkiPath("scheduler-server.key"),
		"--client-ca-file=" + c.ClientCAFile(),
		"--requestheader-client-ca-file=" + c.pkiPath("front-proxy-ca.crt"),
		"--leader-elect=false",
		"--kube-api-qps=500", "--kube-api-burst=1000",
		"--profiling=false",
	}
}

// runAPIServer blocks until ctx ends or the server fails. It must be the
// first of the components: it sets the process-wide feature gates and logging.
//
// upstream's NewAPIServerCommand is no way in: it installs a signal handler,
// and a second such command in the process panics.
func runAPIServer(ctx context.Context, args []string) error {
	s := apiserveroptions.NewServerRunOptions()
	addAdmission(s.Admission.GenericAdmission)
	named := s.Flags()
	if err := parseFlags("kube-apiserver", named.FlagSets, args); err != nil {
		return err
	}
	if err := s.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return err
	}
	gates := s.GenericServerRunOptions.ComponentGlobalsRegistry.FeatureGateFor(basecompatibility.DefaultKubeComponent)
	if err := logsapi.ValidateAndApply(s.Logs, gates); err != nil {
		return err
	}
	completed, err := s.Complete(ctx)
	if err != nil {
		return err
	}
	if errs := completed.Validate(); len(errs) > 0 {
		return errors.Join(errs...)
	}
	if mutable, ok := gates.(featuregate.MutableFeatureGate); ok {
		mutable.AddMetrics()
	}
	return apiserverapp.Run(ctx, completed)
}

func runControllerManager(ctx context.Context, args []string) error {
	s, err := kcmoptions.NewKubeControllerManagerOptions()
	if err != nil {
		return err
	}
	known, disabled, aliases := kcmapp.KnownControllers(), kcmapp.ControllersDisabledByDefault(), kcmapp.ControllerAliases()
	named := s.Flags(known, disabled, aliases)
	s.ParsedFlags = &named
	if err := parseFlags("kube-controller-manager", named.FlagSets, args); err != nil {
		return err
	}
	cfg, err := s.Config(ctx, known, disabled, aliases)
	if err != nil {
		return err
	}
	return kcmapp.Run(ctx, cfg.Complete())
}

func runScheduler(ctx context.Context, args []string) error {
	o := scheduleroptions.NewOptions()
	if err := parseFlags("kube-scheduler", o.Flags.FlagSets, args); err != nil {
		return err
	}
	cfg, sched, err := schedulerapp.Setup(ctx, o)
	if err != nil {
		return err
	}
	return schedulerapp.Run(ctx, cfg, sched)
}

func parseFlags(name string, sets map[string]*pflag.FlagSet, args []string) error {
	all := pflag.NewFlagSet(name, pflag.ContinueOnError)
	for _, fs := range sets {
		all.AddFlagSet(fs)
	}
	return all.Parse(args)
}
