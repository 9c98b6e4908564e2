package vmdk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/storage"
)

// needed are the privileges of the role that volumes take.
var needed = []string{
	"Cns.Searchable",
	"Datastore.FileManagement",
	"StorageProfile.View",
	"VirtualMachine.Config.AddExistingDisk",
	"VirtualMachine.Config.AddRemoveDevice",
}

// privileges are those of the role that deploy/vsphere-role.sh makes.
func privileges(t *testing.T) (all []string) {
	t.Helper()
	script, err := os.ReadFile("../../deploy/vsphere-role.sh")
	if err != nil {
		t.Fatal(err)
	}
	_, list, _ := strings.Cut(string(script), "<<'LIST'\n")
	list, _, ok := strings.Cut(list, "LIST\n")
	if !ok {
		t.Fatal("deploy/vsphere-role.sh has no list of privileges")
	}
	for line := range strings.Lines(list) {
		if id, _, _ := strings.Cut(line, " "); strings.TrimSpace(id) != "" {
			all = append(all, id)
		}
	}
	return all
}

// life does all that can be done with volumes.
func life(ctx context.Context, d *Disks, h storage.Holder) error {
	v, err := d.Create(ctx, claim("pvc-1", 1<<20))
	if err != nil {
		return err
	}
	c := claim("pvc-2", 4<<20)
	c.Source = &storage.Source{VolumeID: v.ID}
	_, cloned := d.Create(ctx, c)
	_, attached := d.Attach(ctx, v.ID, h, storage.AttachOptions{})
	s, snapped := d.Snapshot(ctx, v.ID, "snap-1", nil)
	_, used := d.Used(ctx, v.ID)
	_, complies := d.Compliance(ctx, v.ID)
	_, audited := d.Audit(ctx)
	labelled := d.Relabel(ctx, v.ID, map[string]string{storage.LabelPVC: "other"})
	_, looked := d.Orphans(ctx, nil)
	_, listed := d.Inventory(ctx)
	detached := d.Detach(ctx, v.ID, h)
	return errors.Join(cloned, attached, snapped, used, complies, audited, labelled, looked, listed, detached, d.DeleteSnapshot(ctx, s.ID), d.Delete(ctx, v.ID))
}

func TestLeastPrivilegeSuffices(t *testing.T) {
	all := privileges(t)
	for _, id := range needed {
		if !slices.Contains(all, id) {
			t.Errorf("deploy/vsphere-role.sh lacks %s", id)
		}
	}
	v := startVCenter(t)
	d := v.open(t, v.serve(t, needed))
	if err := life(t.Context(), d, v.vm(t, hostA, 1)); err != nil {
		t.Error(err)
	}
	if left, err := d.Orphans(t.Context(), nil); err != nil || len(left) != 0 {
		t.Errorf("Orphans = %v, %v", left, err)
	}
}

// Each privilege is needed, and an error names the one that is missing.
func TestEachPrivilegeIsNeeded(t *testing.T) {
	for i, missing := range needed {
		t.Run(missing, func(t *testing.T) {
			v := startVCenter(t)
			d := v.open(t, v.serve(t, slices.Delete(slices.Clone(needed), i, i+1)))
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			err := life(ctx, d, v.vm(t, hostA, 1))
			if !errdefs.IsPermissionDenied(err) || !errdefs.IsUnavailable(err) || !strings.Contains(fmt.Sprint(err), missing) {
				t.Errorf("without %s: %v", missing, err)
			}
			if strings.Contains(fmt.Sprint(err), "battery staple") {
				t.Error("the error holds a password")
			}
		})
	}
}
