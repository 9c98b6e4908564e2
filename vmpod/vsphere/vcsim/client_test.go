package vcsim

import (
	"context"
	"crypto/x509"
	"errors"
	"net/url"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/soap"
)

// connect signs in, trusting nothing but the server's own CA.
func connect(ctx context.Context, s *Server, user, password string) (*govmomi.Client, error) {
	sc := soap.NewClient(s.URL(), false)
	if err := setCA(sc, s.CA()); err != nil {
		return nil, err
	}
	vc, err := vim25.NewClient(ctx, sc)
	if err != nil {
		return nil, err
	}
	c := &govmomi.Client{Client: vc, SessionManager: session.NewManager(vc)}
	return c, c.SessionManager.Login(ctx, url.UserPassword(user, password))
}

func setCA(c *soap.Client, pem []byte) error {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return errors.New("no certificate in the PEM")
	}
	c.DefaultTransport().TLSClientConfig.RootCAs = pool
	return nil
}
