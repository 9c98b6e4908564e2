package vcsim

import (
	"context"
	"testing"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/types"
)

const (
	testPassword = "correct horse"
	admin        = "Administrator@vsphere.local"
)

func config(dir string) Config {
	return Config{
		Dir: dir, AdminPassword: testPassword,
		Clusters: []Cluster{{Name: "c1", Hosts: []Host{{Name: "node-1", CPUs: 8, MHz: 2000, Memory: 32 << 30}, {Name: "node-2", CPUs: 8, MHz: 2000, Memory: 32 << 30}}}},
	}
}

func start(t *testing.T, c Config) *Server {
	t.Helper()
	c.PasswordRounds = 1000
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

func signIn(t *testing.T, s *Server, user string) *govmomi.Client {
	t.Helper()
	c, err := connect(t.Context(), s, user, testPassword)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func rootPool(t *testing.T, c *govmomi.Client) *object.ResourcePool {
	t.Helper()
	return must[*object.ResourcePool](t)(find.NewFinder(c.Client).ResourcePool(t.Context(), "/Atoll/host/c1/Resources"))
}

func vmFolder(t *testing.T, c *govmomi.Client) *object.Folder {
	t.Helper()
	return must[*object.Folder](t)(find.NewFinder(c.Client).Folder(t.Context(), "/Atoll/vm"))
}

func spec() types.ResourceConfigSpec { return types.DefaultResourceConfigSpec() }

func TestStart(t *testing.T) {
	s := start(t, config(t.TempDir()))
	if _, err := connect(t.Context(), s, admin, "wrong"); err == nil {
		t.Fatal("a wrong password was accepted")
	}
	c := signIn(t, s, "administrator")
	f := find.NewFinder(c.Client)
	for path, kind := range map[string]string{
		"/Atoll/host/c1/node-2": "HostSystem", "/Atoll/host/c1": "ClusterComputeResource",
		"/Atoll/datastore/atoll": "Datastore", "/Atoll/host/c1/Resources": "ResourcePool",
	} {
		found, err := f.ManagedObjectList(context.Background(), path)
		if err != nil || len(found) != 1 || found[0].Object.Reference().Type != kind {
			t.Errorf("%s: %v %v", path, found, err)
		}
	}
	pool := must[*object.ResourcePool](t)(rootPool(t, c).Create(t.Context(), "Namespaces", spec()))
	t.Log(pool)
}
