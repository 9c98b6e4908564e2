package main

import (
	"strings"
	"testing"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// A node's own check asks for what its datastores need.
func TestNeedsQEMUImg(t *testing.T) {
	of := func(d ...v1alpha1.Datastore) v1alpha1.StorageConfiguration {
		return v1alpha1.StorageConfiguration{Datastores: d}
	}
	plain := v1alpha1.Datastore{Name: "fast", Policies: []v1alpha1.DatastorePolicy{{Name: "gold", Thick: true}}}
	qcow2, secret := plain, plain
	qcow2.Name, qcow2.Format = "nfs", "qcow2"
	secret.Policies = []v1alpha1.DatastorePolicy{{Name: "secret", Encrypted: true}}
	off := of(qcow2)
	off.Disabled = true
	for name, tt := range map[string]struct {
		storage v1alpha1.StorageConfiguration
		want    string
	}{
		"default":   {of(), ""},
		"raw":       {of(plain), ""},
		"qcow2":     {of(plain, qcow2), "datastore nfs has volumes of format qcow2"},
		"encrypted": {of(secret), "policy secret of datastore fast is encrypted"},
		"none":      {off, ""},
	} {
		if got := needsQEMUImg(tt.storage); (tt.want == "") != (got == "") || !strings.Contains(got, tt.want) {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}
