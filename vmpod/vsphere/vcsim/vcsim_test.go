package vcsim

import (
	"context"
	"net/url"
	"testing"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/vim25/soap"
)

const testPassword = "correct horse"

func start(t *testing.T, c Config) *Server {
	t.Helper()
	c.AdminPassword = testPassword
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// connect signs in, trusting nothing but the server's own CA.
func connect(t *testing.T, s *Server, user, password string) (*govmomi.Client, error) {
	t.Helper()
	u := s.URL()
	sc := soap.NewClient(u, false)
	if err := setCA(sc, s.CA()); err != nil {
		t.Fatal(err)
	}
	c, err := newClient(t.Context(), sc)
	if err != nil {
		return nil, err
	}
	return c, c.SessionManager.Login(t.Context(), url.UserPassword(user, password))
}

func TestStart(t *testing.T) {
	s := start(t, Config{Dir: t.TempDir(), Clusters: []Cluster{{Name: "c1", Hosts: []Host{{Name: "node-1"}, {Name: "node-2"}}}}})
	if _, err := connect(t, s, "Administrator@vsphere.local", "wrong"); err == nil {
		t.Fatal("a wrong password was accepted")
	}
	c, err := connect(t, s, "administrator@vsphere.local", testPassword)
	if err != nil {
		t.Fatal(err)
	}
	f := find.NewFinder(c.Client)
	host, err := f.HostSystem(context.Background(), "/Atoll/host/c1/node-2")
	if err != nil {
		t.Fatal(err)
	}
	t.Log(host.Reference())
}
