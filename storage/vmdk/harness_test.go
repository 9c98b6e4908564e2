package vmdk

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/internal/vsphere"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

const (
	adminUser     = "administrator@vsphere.local"
	adminPassword = "correct horse"
	cluster       = "11111111-2222-3333-4444-555555555555"
	hostA, hostB  = "node-a", "node-b"
)

// A vcenter is Atoll's simulator, and what a test has done to it.
type vcenter struct {
	*vcsim.Server
	dir string
}

func startVCenter(t *testing.T) *vcenter {
	t.Helper()
	v := &vcenter{dir: t.TempDir()}
	s, err := vcsim.New(vcsim.Config{
		Dir: v.dir, AdminPassword: adminPassword, PasswordRounds: 1000, Logger: quiet(),
		Clusters:   []vcsim.Cluster{{Name: "c1", Hosts: []vcsim.Host{{Name: hostA, CPUs: 8}, {Name: hostB, CPUs: 8}}}},
		Datastores: []vcsim.Datastore{{Name: "fast", Capacity: 4 << 30, Free: 4 << 30}, {Name: "slow", Capacity: 16 << 30, Free: 8 << 30}},
		Policies:   []vcsim.Policy{{Name: "Any Datastore"}, {Name: "Gold", Datastores: []string{"fast"}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	v.Server = s
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return v
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func (v *vcenter) options() Options {
	return Options{
		VCenter: vsphere.Config{Address: v.URL().Host, CA: v.CA(), Credentials: func(context.Context) (string, string, error) { return adminUser, adminPassword, nil }},
		Cluster: cluster, Instance: instance, Logger: quiet(),
	}
}

// instance is how vmpod names VMs: "<pod UID>_<attempt>", of which the first has
// the pod's UID.
func instance(vm string) (string, error) {
	uuid, attempt, ok := strings.Cut(vm, "_")
	if !ok || attempt != "0" {
		return "", fmt.Errorf("%q is no pod VM", vm)
	}
	return uuid, nil
}

// open starts a process that serves disks, until the test ends.
func (v *vcenter) open(t *testing.T, o Options) *Disks {
	t.Helper()
	d, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return d
}

// vm makes a pod's VM and returns its holder.
func (v *vcenter) vm(t *testing.T, host string, i int) storage.Holder {
	t.Helper()
	uuid := fmt.Sprintf("5d2f6c0e-0001-4000-8000-%012d", i)
	if _, err := v.Mirror(t.Context(), vcsim.Mirror{UUID: uuid, Name: fmt.Sprint("pod-", i), CPUs: 1, MemoryMiB: 128, On: true, Host: host}); err != nil {
		t.Fatal(err)
	}
	return storage.Holder{VM: uuid + "_0", Host: host}
}

// file is where the bytes of a disk are, by its path on the datastore.
func (v *vcenter) file(t *testing.T, path string) string {
	t.Helper()
	store, name, ok := strings.Cut(strings.TrimPrefix(path, "["), "] ")
	if !ok {
		t.Fatalf("%q is no path on a datastore", path)
	}
	return filepath.Join(v.dir, "datastores", store, strings.TrimSuffix(name, ".vmdk")+"-flat.vmdk")
}

func (v *vcenter) write(t *testing.T, a storage.Attachment, at int64, data []byte) {
	t.Helper()
	f, err := os.OpenFile(v.file(t, a.Path), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(data, at); err != nil {
		t.Fatal(err)
	}
}

func (v *vcenter) read(t *testing.T, a storage.Attachment, at, n int64) []byte {
	t.Helper()
	f, err := os.Open(v.file(t, a.Path))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	return b
}

// files are those of all disks, by datastore and name.
func (v *vcenter) files(t *testing.T) []string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(v.dir, "datastores", "*", "fcd", "*-flat.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// vcenters gives each test one of its own.
type vcenters struct {
	mu     sync.Mutex
	byTest map[string]*vcenter
}

func (v *vcenters) of(t *testing.T) *vcenter {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.byTest == nil {
		v.byTest = map[string]*vcenter{}
	}
	if v.byTest[t.Name()] == nil {
		v.byTest[t.Name()] = startVCenter(t)
	}
	return v.byTest[t.Name()]
}

// admin is an administrator's own session.
func (v *vcenter) admin(t *testing.T) *vsphere.Session {
	t.Helper()
	s, err := vsphere.NewSession(v.options().VCenter)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Login(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Client().CloseIdleConnections() })
	return s
}

// serve gives a user a role with privileges, everywhere, and returns how to
// sign in as him.
func (v *vcenter) serve(t *testing.T, privileges []string) Options {
	t.Helper()
	const user, password = "atoll@vsphere.local", "battery staple"
	if err := v.Users().Set(user, password); err != nil {
		t.Fatal(err)
	}
	admin := v.admin(t)
	content := admin.Client().ServiceContent
	role, err := methods.AddAuthorizationRole(t.Context(), admin, &types.AddAuthorizationRole{This: *content.AuthorizationManager, Name: "atoll", PrivIds: privileges})
	if err != nil {
		t.Fatal(err)
	}
	_, err = methods.SetEntityPermissions(t.Context(), admin, &types.SetEntityPermissions{
		This: *content.AuthorizationManager, Entity: content.RootFolder,
		Permission: []types.Permission{{Principal: user, RoleId: role.Returnval, Propagate: true}},
	})
	if err != nil {
		t.Fatal(err)
	}
	o := v.options()
	o.VCenter.Credentials = func(context.Context) (string, string, error) { return user, password, nil }
	return o
}

func claim(name string, bytes int64) storage.Claim {
	return storage.Claim{Name: name, Bytes: bytes, Policy: "any-datastore", Labels: map[string]string{
		storage.LabelNamespace: "team-a", storage.LabelPVC: "data", storage.LabelPV: name, "app": "db",
	}}
}
