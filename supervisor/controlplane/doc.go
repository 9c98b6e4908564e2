// Package controlplane runs a whole Kubernetes control plane in one process:
// etcd, kube-apiserver, kube-controller-manager, kube-scheduler, CoreDNS,
// metrics-server, the approver of kubelets' serving certificates and the server
// that users of vSphere sign in at.
//
// The caller's view:
//
//	cfg := controlplane.Default("/var/lib/atoll")      // every field may be changed
//	controlplane.CheckPorts(cfg) []error               // preflight; nil when all are free
//	controlplane.CheckDataDir(dir) error               // preflight; a newer version is refused
//	controlplane.Run(ctx, cfg, func(Phase)) error      // blocks; PhaseReady is the last phase of a start
//	controlplane.Health(ctx, cfg) []ComponentHealth    // any network namespace, cfg.RunDir is enough
//	controlplane.Backup(ctx, cfg, file) (BackupHeader, error)   // while it runs
//	controlplane.Restore(ctx, cfg, file) (BackupHeader, error)  // while it is stopped, data purged
//	controlplane.HostResolvers("/etc/resolv.conf") ([]string, error) // for cfg.DNSUpstreams
//	cfg.Kubeconfig(), cfg.BootstrapKubeconfig(), cfg.ClientCAFile(), cfg.LogFile()  // paths
//
// Run may be called once in a process: upstream's components keep global
// registries. It enters no network namespace and makes no link: it must be
// started where cfg.Address is already on an interface (ErrFailedPrecondition
// otherwise). Everything it serves listens on cfg.Address or on loopback, with
// TLS; etcd listens on a unix socket of mode 0600 in RunDir/controlplane (0700)
// and on nothing else. Logs of all components go to standard error; the caller
// redirects it to cfg.LogFile(), which the errors name.
//
// # Files
//
//	DIR/version                data directory's format, a decimal number
//	DIR/cluster.json           ranges and the newest version that ever wrote
//	DIR/kubeconfig             cluster administrator, self-contained, 0600
//	DIR/bootstrap.kubeconfig   what a node joins with, self-contained, 0600
//	DIR/pki/                   authorities, certificates, keys, as kubeadm names them
//	DIR/pki/encryption.yaml    key for Secrets at rest, 0600
//	DIR/pki/login/             keys that users' tokens are signed with, 0600
//	DIR/login/revoked          tokens that were given back
//	DIR/pki/kubeconfig/        the components' own kubeconfigs
//	DIR/etcd/                  etcd's data
//	DIR/vcenter/               users and inventory of the embedded vCenter
//	DIR/log/audit.log          who changed what (metadata only), rotated
//
// # Ports
//
//	Address:6443   kube-apiserver       (Config.APIPort)
//	Address:53     CoreDNS, udp and tcp (Config.DNSPort)
//	Address:4443   metrics-server       (Config.MetricsPort)
//	Address:6444   logins of users      (Config.LoginPort)
//	Address:8989   the embedded vCenter (Config.VCenter), if there is one
//	Address:8990   vSphere's REST of namespaces, for another (Config.VSpherePort)
//	127.0.0.1:10257 controller manager, 127.0.0.1:10259 scheduler,
//	127.0.0.1:10354 CoreDNS' readiness, 127.0.0.1:10355 reviews of users' tokens
package controlplane
