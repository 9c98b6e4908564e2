// Package dns serves a cluster's names with CoreDNS, in process.
package dns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"text/template"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	// The plug-ins that the configuration below names register themselves.
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/forward"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/template"
	"k8s.io/klog/v2"
)

// A Config says where to listen and what to answer.
type Config struct {
	// Listen is the one address, udp and tcp, on which queries are answered.
	Listen netip.AddrPort
	// Ready is where GET /ready answers 200 once the cluster's names are known.
	Ready netip.AddrPort
	// Domain of the cluster, without a final dot.
	Domain string
	// Kubeconfig of a user that may list and watch services, endpointslices
	// and namespaces. Its certificate is read again when it changes.
	Kubeconfig string
	// Upstreams answer other names; without any they are NXDOMAIN at once,
	// so that nothing waits for a resolver that is not there.
	Upstreams []netip.AddrPort
}

// corefile is kubeadm's (cmd/kubeadm/app/phases/addons/dns/manifests.go), with
// an explicit address instead of all of them and without what a pod's probes
// and Prometheus would ask.
var corefile = template.Must(template.New("Corefile").Parse(`
{{- $port := .Listen.Port -}}
{{if .Upstreams}}.:{{$port}}{{else}}{{.Domain}}:{{$port}} in-addr.arpa:{{$port}} ip6.arpa:{{$port}}{{end}} {
	bind {{.Listen.Addr}}
	errors
	ready {{.Ready}}
	kubernetes {{.Domain}} in-addr.arpa ip6.arpa {
		kubeconfig {{.Kubeconfig}}
		pods insecure
		ttl 30
		{{- if .Upstreams}}
		fallthrough in-addr.arpa ip6.arpa
		{{- end}}
	}
	{{- if .Upstreams}}
	forward .{{range .Upstreams}} {{.}}{{end}} {
		max_concurrent 1000
	}
	{{- end}}
	cache 30 {
		disable success {{.Domain}}
		disable denial {{.Domain}}
	}
	loadbalance
}
{{- if not .Upstreams}}
.:{{$port}} {
	bind {{.Listen.Addr}}
	errors
	template ANY ANY {
		rcode NXDOMAIN
	}
}
{{- end}}
`))

// Corefile renders the configuration.
func (c Config) Corefile() (string, error) {
	if strings.ContainsAny(c.Kubeconfig, " \t\r\n\"{}#\\") {
		return "", fmt.Errorf("DNS: the path %q has characters that CoreDNS' configuration cannot hold", c.Kubeconfig)
	}
	var b bytes.Buffer
	err := corefile.Execute(&b, c)
	return b.String(), err
}

// A Server is a running CoreDNS.
type Server struct {
	instance *caddy.Instance
	config   Config
}

// Start returns when the server listens; WaitReady when it knows the
// cluster's names. There can be one Server in a process.
func Start(c Config) (*Server, error) {
	text, err := c.Corefile()
	if err != nil {
		return nil, err
	}
	caddy.Quiet, dnsserver.Quiet = true, true
	instance, err := caddy.Start(caddy.CaddyfileInput{Filepath: "Corefile", Contents: []byte(text), ServerTypeName: "dns"})
	// CoreDNS' plug-in makes the whole process' klog its own.
	klog.ClearLogger()
	if err != nil {
		return nil, fmt.Errorf("DNS on %s: %w", c.Listen, err)
	}
	return &Server{instance, c}, nil
}

// WaitReady returns when all plug-ins report ready.
func (s *Server) WaitReady(ctx context.Context) error {
	client := http.Client{Timeout: time.Second}
	defer client.CloseIdleConnections()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.config.Ready.String()+"/ready", nil)
		if err != nil {
			return err
		}
		if resp, err := client.Do(req); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("DNS on %s is not ready: %w", s.config.Listen, ctx.Err())
		case <-time.After(25 * time.Millisecond):
		}
	}
}

// Run blocks until ctx ends, and stops the server then, or until the server
// has ended by itself.
func (s *Server) Run(ctx context.Context) error {
	ended := make(chan struct{})
	go func() { s.instance.Wait(); close(ended) }()
	select {
	case <-ended:
		return fmt.Errorf("DNS on %s has stopped listening", s.config.Listen)
	case <-ctx.Done():
	}
	err := s.instance.Stop()
	return errors.Join(append(s.instance.ShutdownCallbacks(), err)...)
}

// Lookup asks the server at addr for the IPv4 addresses of name.
func Lookup(ctx context.Context, addr netip.AddrPort, name string) ([]netip.Addr, error) {
	r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, addr.String())
	}}
	return r.LookupNetIP(ctx, "ip4", strings.TrimSuffix(name, ".")+".")
}
