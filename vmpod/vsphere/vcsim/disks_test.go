package vcsim

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/vmware/govmomi/cli"
	_ "github.com/vmware/govmomi/cli/device"
	_ "github.com/vmware/govmomi/cli/disk"
	_ "github.com/vmware/govmomi/cli/disk/snapshot"
	_ "github.com/vmware/govmomi/cli/storage/policy"
	_ "github.com/vmware/govmomi/cli/volume"
	_ "github.com/vmware/govmomi/cli/volume/snapshot"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// TestMain is stock govc where it is asked to be.
func TestMain(m *testing.M) {
	if os.Getenv("VCSIM_TEST_GOVC") != "" {
		os.Exit(cli.Run(os.Args[1:]))
	}
	os.Exit(m.Run())
}

// govc runs a command against the server and returns what it printed.
func govc(t *testing.T, s *Server, args ...string) (string, error) {
	t.Helper()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, s.CA(), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), "VCSIM_TEST_GOVC=1", "GOVC_SHOW_UNRELEASED=true", "HOME="+t.TempDir(), "GOVC_URL="+s.URL().String(), "GOVC_USERNAME="+admin,
		"GOVC_PASSWORD="+testPassword, "GOVC_TLS_CA_CERTS="+ca, "GOVC_PERSIST_SESSION=false")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("govc %s: %w: %s", strings.Join(args, " "), err, errs.String())
	}
	return strings.TrimSpace(out.String()), nil
}

func mustGovc(t *testing.T, s *Server, args ...string) string {
	t.Helper()
	return must[string](t)(govc(t, s, args...))
}

func diskConfig(dir string) Config {
	c := config(dir)
	c.Datastores = []Datastore{{Name: "fast", Capacity: 64 << 30, Free: 64 << 30}, {Name: "slow", Capacity: 64 << 30, Free: 64 << 30}}
	c.Policies = []Policy{{Name: "gold", Datastores: []string{"fast"}}, {Name: "any"}}
	return c
}

func disksOf(t *testing.T, s *Server, vm string) (all []*types.VirtualDisk) {
	t.Helper()
	c := signIn(t, s, admin)
	var o mo.VirtualMachine
	err := property.DefaultCollector(c.Client).RetrieveOne(t.Context(), types.ManagedObjectReference{Type: "VirtualMachine", Value: vm}, []string{"config.hardware.device"}, &o)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range object.VirtualDeviceList(o.Config.Hardware.Device).SelectByType((*types.VirtualDisk)(nil)) {
		if disk := d.(*types.VirtualDisk); disk.VDiskId != nil {
			all = append(all, disk)
		}
	}
	return all
}

func free(t *testing.T, s *Server, name string) int64 {
	t.Helper()
	c := signIn(t, s, admin)
	var o mo.Datastore
	if err := property.DefaultCollector(c.Client).RetrieveOne(t.Context(), s.inventory.stores[name], []string{"summary"}, &o); err != nil {
		t.Fatal(err)
	}
	return o.Summary.FreeSpace
}

var idForm = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// TestGovcDisks is an admin at work with stock govc.
func TestGovcDisks(t *testing.T) {
	dir := t.TempDir()
	s := start(t, diskConfig(dir))
	vm := must[string](t)(s.Mirror(t.Context(), Mirror{UUID: podUUID, Name: "web", CPUs: 1, MemoryMiB: 256, Host: "node-1", On: true}))
	other := must[string](t)(s.Mirror(t.Context(), Mirror{UUID: "11111111-2222-3333-4444-666666666666", Name: "db", CPUs: 1, MemoryMiB: 256, Host: "node-2", On: true}))

	id := mustGovc(t, s, "disk.create", "-ds", "fast", "-size", "1G", "data")
	if !idForm.MatchString(id) {
		t.Fatalf("disk.create printed %q", id)
	}
	flat := filepath.Join(dir, "datastores", "fast", "fcd", id+"-flat.vmdk")
	if fi, err := os.Stat(flat); err != nil || fi.Size() != 1<<30 || fi.Mode().Perm() != 0o600 || allocated(flat) > 1<<20 {
		t.Fatalf("the disk's file: %v, %v, %d bytes taken", fi, err, allocated(flat))
	}
	if out := mustGovc(t, s, "disk.ls", "-l"); !strings.Contains(out, id) || !strings.Contains(out, "data") || !strings.Contains(out, "1.0G") {
		t.Errorf("disk.ls -l:\n%s", out)
	}
	for _, query := range []string{"name.sw=da", "capacity.ge=1024"} {
		if out := mustGovc(t, s, "disk.ls", "-q", query); !strings.Contains(out, id) {
			t.Errorf("disk.ls -q %s: %q", query, out)
		}
	}
	if out := mustGovc(t, s, "disk.ls", "-q", "name.sw=x"); out != "" {
		t.Errorf("disk.ls of another name: %q", out)
	}

	mustGovc(t, s, "disk.attach", "-vm", "web", "-ds", "fast", id)
	disks := disksOf(t, s, vm)
	if len(disks) != 1 || disks[0].VDiskId.Id != id || disks[0].CapacityInBytes != 1<<30 {
		t.Fatalf("devices after the attach: %+v", disks)
	}
	backing := disks[0].Backing.(*types.VirtualDiskFlatVer2BackingInfo)
	if backing.FileName != "[fast] fcd/"+id+".vmdk" || backing.Uuid == "" {
		t.Errorf("its backing: %+v", backing)
	}
	if _, err := govc(t, s, "disk.attach", "-vm", "db", "-ds", "fast", id); err == nil || len(disksOf(t, s, other)) != 0 {
		t.Errorf("a second VM was given the disk: %v", err)
	}
	if _, err := govc(t, s, "disk.rm", id); err == nil {
		t.Error("a disk that is attached was removed")
	}
	// What the VM's pod does later leaves its disks where they are.
	must[string](t)(s.Mirror(t.Context(), Mirror{UUID: podUUID, Name: "web", CPUs: 2, MemoryMiB: 256, Host: "node-1", On: true}))
	if len(disksOf(t, s, vm)) != 1 {
		t.Error("the disk went with a change of the pod")
	}

	if err := os.WriteFile(flat, []byte("what it was"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(flat, 1<<30); err != nil {
		t.Fatal(err)
	}
	snap := mustGovc(t, s, "disk.snapshot.create", id, "before")
	if out := mustGovc(t, s, "disk.snapshot.ls", id); !strings.Contains(out, "before") {
		t.Errorf("disk.snapshot.ls: %q of %s", out, snap)
	}
	frozen, err := os.ReadFile(filepath.Join(dir, "datastores", "fast", "fcd", id+"-"+snap+"-flat.vmdk"))
	if err != nil || !bytes.HasPrefix(frozen, []byte("what it was")) {
		t.Errorf("the snapshot's bytes: %.20q, %v", frozen, err)
	}
	mustGovc(t, s, "disk.snapshot.rm", id, snap)
	mustGovc(t, s, "disk.detach", "-vm", "web", id)
	if len(disksOf(t, s, vm)) != 0 {
		t.Error("the disk is still a device")
	}
	mustGovc(t, s, "disk.rm", id)
	if left, _ := filepath.Glob(filepath.Join(dir, "datastores", "fast", "fcd", "*")); len(left) != 0 {
		t.Errorf("files are left: %q", left)
	}
}

func TestGovcVolumes(t *testing.T) {
	s := start(t, diskConfig(""))
	before := free(t, s, "fast")
	id := mustGovc(t, s, "volume.create", "-cluster-id", "shop", "-profile", "gold", "-ds", "fast", "-size", "1G", "pvc-1")
	if out := mustGovc(t, s, "volume.ls", "-l", "-c", "shop"); !strings.Contains(out, "pvc-1") || !strings.Contains(out, "1.0GB") || !strings.Contains(out, "shop") {
		t.Errorf("volume.ls -l:\n%s", out)
	}
	if out := mustGovc(t, s, "volume.ls", "-b", "-n", "pvc-1"); !strings.Contains(out, "[fast] fcd/"+id) {
		t.Errorf("volume.ls -b: %q of %q", out, id)
	}
	if out := mustGovc(t, s, "disk.ls"); !strings.Contains(out, "pvc-1") {
		t.Errorf("disk.ls: %q", out)
	}
	mustGovc(t, s, "volume.extend", "-size", "2G", id)
	if fi, err := os.Stat(s.files().flat(s.disks[id])); err != nil || fi.Size() != 2<<30 {
		t.Errorf("extended: %v, %v", fi, err)
	}
	snap := mustGovc(t, s, "volume.snapshot.create", id, "now")
	if out := mustGovc(t, s, "volume.snapshot.ls", id); !strings.Contains(out, "now") {
		t.Errorf("volume.snapshot.ls: %q", out)
	}
	if _, err := govc(t, s, "volume.rm", id); err == nil && len(s.disks) == 0 {
		t.Error("a volume that has snapshots was removed")
	}
	mustGovc(t, s, "volume.snapshot.rm", strings.Fields(snap)[0], id)
	mustGovc(t, s, "volume.rm", id)
	if after := free(t, s, "fast"); len(s.disks) != 0 || after != before {
		t.Errorf("%d disks are left, %d bytes of %d are free", len(s.disks), after, before)
	}
	if _, err := govc(t, s, "volume.create", "-cluster-id", "shop", "-profile", "gold", "-ds", "slow", "-size", "1G", "pvc-2"); err == nil && len(s.disks) > 0 {
		t.Error("a volume is where its policy does not fit")
	}
	if _, err := govc(t, s, "volume.create", "-cluster-id", "shop", "-ds", "slow", "-size", "65G", "pvc-3"); err == nil && len(s.disks) > 0 {
		t.Error("a volume is larger than its datastore")
	}
}

// TestDisksAfterRestart: disks, their place in VMs and what is free are kept.
func TestDisksAfterRestart(t *testing.T) {
	dir := t.TempDir()
	c := diskConfig(dir)
	s := start(t, c)
	vm := must[string](t)(s.Mirror(t.Context(), Mirror{UUID: podUUID, Name: "web", CPUs: 1, MemoryMiB: 256, Host: "node-1"}))
	id := mustGovc(t, s, "volume.create", "-cluster-id", "shop", "-profile", "gold", "-ds", "fast", "-size", "1G", "pvc-1")
	mustGovc(t, s, "disk.attach", "-vm", "web", id)
	mustGovc(t, s, "disk.snapshot.create", id, "before")
	listed, left := mustGovc(t, s, "volume.ls", "-json", id), free(t, s, "fast")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = start(t, c)
	if again := mustGovc(t, s, "volume.ls", "-json", id); again != listed {
		t.Errorf("before:\n%s\nafter:\n%s", listed, again)
	}
	if disks := disksOf(t, s, vm); len(disks) != 1 || disks[0].VDiskId.Id != id {
		t.Errorf("devices after the restart: %+v", disks)
	}
	if now := free(t, s, "fast"); now != left {
		t.Errorf("%d bytes are free, were %d", now, left)
	}
	// A VM that goes leaves its disks.
	if err := s.Unmirror(t.Context(), podUUID); err != nil {
		t.Fatal(err)
	}
	if d := s.disks[id]; d == nil || d.At != nil {
		t.Errorf("after its VM went: %+v", d)
	}
}
