package controlplane

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/soap"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// TestVCenter finds the embedded vCenter as `atoll enter` points govc at it,
// and what the supervisor made of it, before and after a restart.
func TestVCenter(t *testing.T) {
	cfg := testConfig(t)
	cfg.VCenter = &VCenter{Port: DefaultVCenterPort, Hosts: []vcsim.Host{{Name: "node-1", CPUs: 4, Memory: 8 << 30}}}
	s := startServer(t, cfg)
	admin, instance := vcenterAdmin(t, cfg)
	f := find.NewFinder(admin.Client)
	for _, path := range []string{"/Atoll/host/atoll/node-1", "/Atoll/host/atoll/Resources"} {
		if found, err := f.ManagedObjectList(t.Context(), path); err != nil || len(found) != 1 {
			t.Errorf("%s: %v %v", path, found, err)
		}
	}
	dyn, err := dynamic.NewForConfig(restFrom(t, cfg.Kubeconfig()))
	if err != nil {
		t.Fatal(err)
	}
	supervisors := dyn.Resource(v1alpha1.SchemeGroupVersion.WithResource("supervisors"))
	sv, err := supervisors.Get(t.Context(), v1alpha1.SupervisorName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	uid := sv.GetUID()
	eventually(t, "the Supervisor to be ready, with an account of its own", func() error {
		sv, err := supervisors.Get(t.Context(), v1alpha1.SupervisorName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		var s v1alpha1.Supervisor
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(sv.Object, &s); err != nil {
			return err
		}
		if !meta.IsStatusConditionTrue(s.Status.Conditions, v1alpha1.ConditionReady) {
			return fmt.Errorf("conditions %+v", s.Status.Conditions)
		}
		return nil
	})
	checkHealth(t, cfg)
	for _, c := range Health(t.Context(), cfg) {
		if want := "embedded, on https://" + cfg.VCenterAddress().String(); c.Name == "vcenter" && c.Message != want {
			t.Errorf("health of vCenter: %q, want %q", c.Message, want)
		}
	}
	if log, err := os.ReadFile(cfg.DataDir + ".log"); err != nil || strings.Contains(string(log), adminPassword(t, cfg)) {
		t.Errorf("the administrator's password is in the log (%v)", err)
	}
	if took := s.stop(t); took > 10*time.Second {
		t.Errorf("stop took %v with a session open", took)
	}
	s = startServer(t, cfg)
	if _, again := vcenterAdmin(t, cfg); again != instance {
		t.Errorf("vCenter is %s after a restart, was %s", again, instance)
	}
	if sv, err = supervisors.Get(t.Context(), v1alpha1.SupervisorName, metav1.GetOptions{}); err != nil || sv.GetUID() != uid {
		t.Errorf("supervisor %v after a restart (%v), was %v", sv.GetUID(), err, uid)
	}
	restoreVCenter(t, cfg, s, instance)
}

// restoreVCenter: a backup of a running cluster brings the embedded vCenter
// back with its users and what they made.
func restoreVCenter(t *testing.T, cfg Config, s *server, instance string) {
	admin, _ := vcenterAdmin(t, cfg)
	folders, err := find.NewFinder(admin.Client).Folder(t.Context(), "/Atoll/vm")
	if err != nil {
		t.Fatal(err)
	}
	kept, err := folders.CreateFolder(t.Context(), "kept")
	if err != nil {
		t.Fatal(err)
	}
	if err := SetVCenterUser(t.Context(), cfg, VCenterUser{Name: "ann"}, "Ann-has-1-password"); err != nil {
		t.Fatal(err)
	}
	file := cfg.DataDir + ".backup"
	t.Cleanup(func() { os.Remove(file) })
	if _, err := Backup(t.Context(), cfg, file); err != nil {
		t.Fatal(err)
	}
	password := adminPassword(t, cfg)
	s.stop(t)
	if err := errors.Join(os.RemoveAll(cfg.DataDir), os.MkdirAll(cfg.VCenterDir(), 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := Restore(t.Context(), cfg, file); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("restore over the files of a vCenter: %v", err)
	}
	if err := os.Remove(cfg.VCenterDir()); err != nil {
		t.Fatal(err)
	}
	if _, err := Restore(t.Context(), cfg, file); err != nil {
		t.Fatal(err)
	}
	for _, name := range vcsim.KeptFiles() {
		if st, err := os.Stat(filepath.Join(cfg.VCenterDir(), name)); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s after a restore: %v, %v", name, st, err)
		}
	}
	s = startServer(t, cfg)
	if got := adminPassword(t, cfg); got != password {
		t.Error("the administrator has another password after a restore")
	}
	admin, again := vcenterAdmin(t, cfg)
	if again != instance {
		t.Errorf("vCenter is %s after a restore, was %s", again, instance)
	}
	if f, err := find.NewFinder(admin.Client).Folder(t.Context(), "/Atoll/vm/kept"); err != nil || f.Reference() != kept.Reference() {
		t.Errorf("folder after a restore: %v (%v), was %v", f, err, kept)
	}
	users, err := VCenterUsers(t.Context(), cfg)
	if err != nil || !slices.ContainsFunc(users, func(u VCenterUser) bool { return strings.HasPrefix(u.Name, "ann@") }) {
		t.Errorf("users after a restore: %v, %v", users, err)
	}
	s.stop(t)
}

func adminPassword(t *testing.T, cfg Config) string {
	t.Helper()
	b, err := os.ReadFile(cfg.VCenterPasswordFile())
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(cfg.VCenterPasswordFile()); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode of the password file: %v %v", st.Mode(), err)
	}
	return strings.TrimSpace(string(b))
}

// vcenterAdmin signs in as the administrator, trusting the cluster's authority.
func vcenterAdmin(t *testing.T, cfg Config) (c *govmomi.Client, instance string) {
	t.Helper()
	ca, err := os.ReadFile(cfg.ClientCAFile())
	if err != nil {
		t.Fatal(err)
	}
	sc := soap.NewClient(&url.URL{Scheme: "https", Host: cfg.VCenterAddress().String(), Path: vim25.Path}, false)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	sc.DefaultTransport().TLSClientConfig.RootCAs = roots
	vc, err := vim25.NewClient(t.Context(), sc)
	if err != nil {
		t.Fatal(err)
	}
	c = &govmomi.Client{Client: vc, SessionManager: session.NewManager(vc)}
	if err := c.SessionManager.Login(t.Context(), url.UserPassword(cfg.VCenterUser(), adminPassword(t, cfg))); err != nil {
		t.Fatal(err)
	}
	return c, vc.ServiceContent.About.InstanceUuid
}
