package controlplane

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/net/netutil"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/supervisor/namespaces/rest"
)

// DefaultVSpherePort serves vSphere's REST of namespaces, on Config.Address.
const DefaultVSpherePort = 8990

// maxFrontConnections: strangers do not take all descriptors.
const maxFrontConnections = 512

// VSphereAddress is where vSphere's REST of namespaces is served in front of a
// vCenter that is not embedded.
func (c Config) VSphereAddress() netip.AddrPort { return netip.AddrPortFrom(c.Address, c.VSpherePort) }

// startVSphereFront serves vSphere's REST of namespaces in front of the
// Supervisor's vCenter, where that is not the embedded one: it serves them
// itself.
func (s *supervisor) startVSphereFront() error {
	c := s.config
	if c.VSpherePort == 0 {
		return nil
	}
	o, err := c.restOptions()
	if err != nil {
		return err
	}
	targets, err := c.frontTargets()
	if err != nil {
		return err
	}
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(c.VSphereAddress()))
	if err != nil {
		return fmt.Errorf("vSphere's REST of namespaces: %w", err)
	}
	server := &http.Server{
		Handler:           rest.NewFront(o, targets.get),
		ReadHeaderTimeout: 10 * time.Second, // a watch's answer may take long
		IdleTimeout:       5 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			// That of logins, for the same names; renewed ones are seen.
			cert, err := tls.LoadX509KeyPair(c.pkiPath("login.crt"), c.pkiPath("login.key"))
			return &cert, err
		}},
	}
	s.start(s.clients, "vsphere-rest", func(ctx context.Context) error {
		stop := context.AfterFunc(ctx, func() { _ = server.Close() })
		defer stop()
		err := server.ServeTLS(netutil.LimitListener(l, maxFrontConnections), "", "")
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		return err
	})
	return nil
}

func (c Config) frontTargets() (*frontTargets, error) {
	// The namespaces' controller may read the Supervisor and its Secret.
	client, dyn, err := clients(c, namespaceKeeper)
	if err != nil {
		return nil, err
	}
	targets := &frontTargets{client: client, dynamic: dyn}
	if c.VCenter != nil {
		targets.embedded = c.VCenterAddress().String()
	}
	return targets, nil
}

// frontTargets knows the Supervisor's vCenter, as it was at most
// supervisorCacheTime ago.
type frontTargets struct {
	client   kubernetes.Interface
	dynamic  dynamic.Interface
	embedded string // address; empty: there is none

	mu   sync.Mutex
	have rest.Target
	err  error
	read time.Time
}

func (f *frontTargets) get(ctx context.Context) (rest.Target, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if time.Since(f.read) < supervisorCacheTime {
		return f.have, f.err
	}
	have, err := f.fetch(ctx)
	if ctx.Err() != nil {
		return have, ctx.Err() // of this caller alone
	}
	f.have, f.err, f.read = have, err, time.Now()
	return have, err
}

func (f *frontTargets) fetch(ctx context.Context) (rest.Target, error) {
	object, err := f.dynamic.Resource(v1alpha1.SchemeGroupVersion.WithResource("supervisors")).Get(ctx, v1alpha1.SupervisorName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return rest.Target{}, fmt.Errorf("there is no Supervisor %q that names a vCenter: make one with kubectl: %w", v1alpha1.SupervisorName, errdefs.ErrUnavailable)
	}
	if err != nil {
		return rest.Target{}, fmt.Errorf("read the Supervisor: %v: %w", err, errdefs.ErrUnavailable)
	}
	var sv v1alpha1.Supervisor
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(object.Object, &sv); err != nil {
		return rest.Target{}, fmt.Errorf("read the Supervisor: %v: %w", err, errdefs.ErrUnavailable)
	}
	v, ref := sv.Spec.VCenter, sv.Spec.VCenter.CredentialsSecret
	return rest.Target{
		Address: v.Server, CA: v.CABundle, Thumbprint: v.Thumbprint, Serves: f.embedded != "" && v.Server == f.embedded,
		Credentials: func(ctx context.Context) (string, string, error) { return f.credentials(ctx, ref) },
	}, nil
}

// credentials reads them anew: they are in no cache.
func (f *frontTargets) credentials(ctx context.Context, ref v1alpha1.SecretReference) (user, password string, err error) {
	secret, err := f.client.CoreV1().Secrets(ref.Namespace).Get(ctx, ref.Name, metav1.GetOptions{})
	if err != nil {
		return "", "", fmt.Errorf("credentials of vCenter, Secret %s/%s: %v: %w", ref.Namespace, ref.Name, err, errdefs.ErrUnavailable)
	}
	return string(secret.Data[corev1.BasicAuthUsernameKey]), string(secret.Data[corev1.BasicAuthPasswordKey]), nil
}

// supervisorCredentials are those of the Supervisor's Secret, as it is now.
func (f *frontTargets) supervisorCredentials(ctx context.Context) (user, password string, err error) {
	t, err := f.get(ctx)
	if err != nil {
		return "", "", err
	}
	return t.Credentials(ctx)
}
