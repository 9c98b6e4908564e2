package csi_test

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/csi"
	"github.com/openatoll/atoll/storage/local"
)

// guest stands in for pods' VMs, of which there are none here.
type guest struct{}

func (guest) VolumeUsage(context.Context, string, string) (storage.Usage, error) {
	return storage.Usage{CapacityBytes: 1000, Bytes: 100, AvailableBytes: 900, InodesCapacity: 10, Inodes: 1, InodesFree: 9}, nil
}

func (guest) ExpandVolume(context.Context, string, string, int64) error { return nil }

const policy = "thin"

// openLocal opens one datastore in dir.
func openLocal(t *testing.T, dir, format string) storage.Disks {
	t.Helper()
	store := filepath.Join(dir, "store")
	if err := os.MkdirAll(store, 0o700); err != nil {
		t.Fatal(err)
	}
	disks, err := local.OpenDisks(t.Context(), local.DisksConfig{
		Host: "host-1", StateDir: filepath.Join(dir, "state"),
		Datastores: []local.Datastore{{Name: "store", Path: store, Format: format, Policies: []local.DatastorePolicy{{Policy: storage.Policy{Name: policy}}}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return disks
}

// serve serves a driver on a socket until the test ends.
func serve(t *testing.T, dir string, disks storage.Disks) (socket string) {
	t.Helper()
	d, err := csi.New(csi.Config{Disks: disks, NodeName: "host-1", Guest: guest{}, DefaultPolicy: policy, Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "csi.sock")
	l, err := csi.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
	return socket
}

// TestSanity runs the CSI project's own suite, a program of its own: it speaks a
// newer version of CSI than this module can link.
func TestSanity(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a while")
	}
	for _, tt := range []struct{ name, format, access string }{
		{"raw files as file systems", storage.FormatRaw, "mount"},
		{"raw files as devices", storage.FormatRaw, "block"},
		{"qcow2 as file systems", storage.FormatQCOW2, "mount"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sanity(t, func(dir string) storage.Disks { return openLocal(t, dir, tt.format) }, tt.access)
		})
	}
}

// sanity runs the suite against a driver of the disks that open opens in a
// directory of their own.
func sanity(t *testing.T, open func(dir string) storage.Disks, access string) {
	t.Helper()
	program, err := filepath.Abs("../../bin/csi-sanity")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%v: run `make bin/csi-sanity`", err)
	}
	dir, err := os.MkdirTemp("", "csi") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	socket := serve(t, dir, open(dir))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, "-csi.endpoint=unix://"+socket, "-csi.testvolumeaccesstype="+access,
		"-csi.mountdir="+filepath.Join(dir, "mnt"), "-csi.stagingdir="+filepath.Join(dir, "staging"),
		"-csi.testvolumesize=16777216", "-csi.testvolumeexpandsize=33554432", "-ginkgo.no-color").CombinedOutput()
	t.Logf("%s", tail(string(out), 60))
	if err != nil {
		t.Errorf("csi-sanity: %v; again: %s -csi.endpoint=unix://SOCKET", err, program)
	}
	if !strings.Contains(string(out), " 0 Failed") || strings.Contains(string(out), "Ran 0 of") {
		t.Error("csi-sanity ran nothing, or did not tell")
	}
}

func tail(s string, lines int) string {
	all := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
