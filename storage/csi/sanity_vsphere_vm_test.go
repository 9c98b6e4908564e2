package csi_test

import (
	"context"
	"log/slog"
	"strings"
	"testing"

	"github.com/openatoll/atoll/internal/vsphere"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/vmdk"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// openVSphere opens volumes in a vCenter of the test's own.
func openVSphere(t *testing.T) storage.Disks {
	t.Helper()
	const password = "correct horse"
	quiet := slog.New(slog.DiscardHandler)
	vcenter, err := vcsim.New(vcsim.Config{
		Dir: t.TempDir(), AdminPassword: password, PasswordRounds: 1000, Logger: quiet,
		Clusters:   []vcsim.Cluster{{Name: "c1", Hosts: []vcsim.Host{{Name: "host-1"}, {Name: "host-2"}}}},
		Datastores: []vcsim.Datastore{{Name: "store", Capacity: 64 << 30, Free: 64 << 30}},
		Policies:   []vcsim.Policy{{Name: policy}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := vcenter.Close(); err != nil {
			t.Error(err)
		}
	})
	disks, err := vmdk.New(vmdk.Options{
		VCenter: vsphere.Config{Address: vcenter.URL().Host, CA: vcenter.CA(), Credentials: func(context.Context) (string, string, error) {
			return "administrator@vsphere.local", password, nil
		}},
		Cluster: "sanity", Instance: func(vm string) (string, error) { return strings.TrimSuffix(vm, "_0"), nil }, Logger: quiet,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- disks.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return disks
}

// TestSanityVSphere runs the CSI project's suite over First Class Disks.
func TestSanityVSphere(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a while")
	}
	for _, access := range []string{"mount", "block"} {
		t.Run(access, func(t *testing.T) {
			sanity(t, func(string) storage.Disks { return openVSphere(t) }, access)
		})
	}
}
