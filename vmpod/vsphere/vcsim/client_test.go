package vcsim

import (
	"context"
	"crypto/x509"
	"errors"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/soap"
)

func setCA(c *soap.Client, pem []byte) error {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return errors.New("no certificate in the PEM")
	}
	c.DefaultTransport().TLSClientConfig.RootCAs = pool
	return nil
}

func newClient(ctx context.Context, sc *soap.Client) (*govmomi.Client, error) {
	c, err := vim25.NewClient(ctx, sc)
	if err != nil {
		return nil, err
	}
	return &govmomi.Client{Client: c, SessionManager: session.NewManager(c)}, nil
}
