// Package metricsserver runs sigs.k8s.io/metrics-server in process: what
// `kubectl top` and the horizontal pod autoscaler read.
package metricsserver

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

	"sigs.k8s.io/metrics-server/cmd/metrics-server/app/options"
)

// Resolution is the time between two readings of every kubelet. It is what
// upstream's manifests set; its own default of 60 s makes the autoscaler slow.
const Resolution = 15 * time.Second

// A Config says where to serve and whom to trust.
type Config struct {
	Listen netip.AddrPort
	// CertFile and KeyFile are the serving certificate; read again when they
	// change.
	CertFile, KeyFile string
	// Kubeconfig is used towards the API server and, with its certificate,
	// towards the kubelets.
	Kubeconfig string
	// ClientCAFile verifies clients, RequestHeaderCAFile the API server's
	// aggregator.
	ClientCAFile, RequestHeaderCAFile string
	// KubeletCAFile verifies the kubelets' serving certificates, for the
	// InternalIP of each Node.
	KubeletCAFile string
}

// A Server is ready to run.
type Server struct {
	run func(stop <-chan struct{}) error
}

// New builds a server. The API server must be up: delegated authentication
// reads its configuration from there.
func New(c Config) (*Server, error) {
	o := options.NewOptions()
	o.Kubeconfig = c.Kubeconfig
	o.MetricResolution = Resolution
	o.SecureServing.BindAddress = net.IP(c.Listen.Addr().AsSlice())
	o.SecureServing.BindPort = int(c.Listen.Port())
	o.SecureServing.ServerCert.CertKey.CertFile = c.CertFile
	o.SecureServing.ServerCert.CertKey.KeyFile = c.KeyFile
	o.Authentication.RemoteKubeConfigFile = c.Kubeconfig
	o.Authentication.ClientCert.ClientCA = c.ClientCAFile
	o.Authentication.RequestHeader.ClientCAFile = c.RequestHeaderCAFile
	o.Authentication.RequestHeader.AllowedNames = []string{"front-proxy-client"}
	o.Authorization.RemoteKubeConfigFile = c.Kubeconfig
	o.Features.EnableProfiling = false
	o.KubeletClient.KubeletCAFile = c.KubeletCAFile
	o.KubeletClient.KubeletPreferredAddressTypes = []string{"InternalIP"}
	// Nodes may share a machine, each with a port of its own.
	o.KubeletClient.KubeletUseNodeStatusPort = true
	o.KubeletClient.KubeletRequestTimeout = 10 * time.Second
	if errs := append(o.KubeletClient.Validate(), o.GenericServerRunOptions.Validate()...); len(errs) > 0 {
		return nil, fmt.Errorf("metrics-server: %w", errs[0])
	}
	cfg, err := o.ServerConfig()
	if err != nil {
		return nil, fmt.Errorf("metrics-server: %w", err)
	}
	s, err := cfg.Complete()
	if err != nil {
		return nil, fmt.Errorf("metrics-server on %s: %w", c.Listen, err)
	}
	return &Server{s.RunUntil}, nil
}

// Run blocks until ctx ends or the server fails.
func (s *Server) Run(ctx context.Context) error { return s.run(ctx.Done()) }
