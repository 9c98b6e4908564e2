package main

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/netplugin"
	"github.com/openatoll/atoll/vmpod/qemu"
)

func TestMain(m *testing.M) {
	qemu.RunProbeChild()
	os.Exit(m.Run())
}

func TestVMUser(t *testing.T) {
	for name, want := range map[string]uint32{"root": 0, "1234": 1234} {
		if uid, gid, n, err := vmUser(name); uid != want || gid != want || n != 1 || err != nil {
			t.Errorf("vmUser(%q) = %d, %d, %d, %v", name, uid, gid, n, err)
		}
	}
	if uid, _, n, err := vmUser(""); uid < 65536 || n < 1000 || uid+n > 524288 || err != nil {
		t.Errorf("the default is %d users from %d, %v; want many that nobody else has", n, uid, err)
	}
	if _, _, _, err := vmUser("no-such-user"); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), "no-such-user") {
		t.Errorf("an unknown user: %v", err)
	}
}

func TestLock(t *testing.T) {
	file := filepath.Join(t.TempDir(), "lock")
	unlock, err := lock(file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock(file); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("a second lock: %v", err)
	}
	unlock()
	if unlock, err = lock(file); err != nil {
		t.Errorf("after unlock: %v", err)
	} else {
		unlock()
	}
}

// network remembers what it was configured with.
type network struct {
	netplugin.Network
	got []netip.Prefix
}

func (n *network) Configure(_ context.Context, p []netip.Prefix) error {
	n.got = p
	return nil
}

func TestPodRangeIsRemembered(t *testing.T) {
	ctx, file := context.Background(), filepath.Join(t.TempDir(), "podcidr.json")
	var first, second network
	r, err := remember(ctx, &first, file)
	if err != nil || first.got != nil {
		t.Fatalf("the first start was configured with %v, %v", first.got, err)
	}
	want := []netip.Prefix{netip.MustParsePrefix("198.19.3.0/24")}
	if err := r.Configure(ctx, want); err != nil {
		t.Fatal(err)
	}
	if _, err := remember(ctx, &second, file); err != nil || !slices.Equal(second.got, want) {
		t.Errorf("the second start was configured with %v, %v", second.got, err)
	}
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := remember(ctx, &second, file); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("a damaged file: %v", err)
	}
}

func TestNamespaceThatIsGone(t *testing.T) {
	cfg := &v1alpha1.SphereletConfiguration{NetworkNamespace: "atoll-test-gone"}
	if err := enterNamespace(cfg, false); err != nil {
		t.Errorf("clean up: %v", err)
	}
	if err := enterNamespace(cfg, true); err == nil || !strings.Contains(err.Error(), "atoll-test-gone") {
		t.Errorf("run: %v", err)
	}
	cfg.NetworkNamespace = "/proc/self/ns/net" // already there: nothing to execute
	if err := enterNamespace(cfg, true); err != nil {
		t.Error(err)
	}
}

func TestRemoveCgroups(t *testing.T) {
	mount := t.TempDir()
	for _, dir := range []string{"memory/atoll/a/burstable/x_0", "memory/atoll/b/y_0", "pids/atoll/a"} {
		if err := os.MkdirAll(filepath.Join(mount, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := removeCgroups(mount, "atoll/a"); err != nil {
			t.Fatal(err)
		}
	}
	var left []string
	_ = filepath.WalkDir(mount, func(p string, _ os.DirEntry, _ error) error {
		rel, _ := filepath.Rel(mount, p)
		left = append(left, rel)
		return nil
	})
	if want := []string{".", "memory", "memory/atoll", "memory/atoll/b", "memory/atoll/b/y_0", "pids"}; !slices.Equal(left, want) {
		t.Errorf("left %v, want %v", left, want)
	}
}

func TestCleanupOfNothing(t *testing.T) {
	dir := t.TempDir()
	cfg := &v1alpha1.SphereletConfiguration{DataDir: filepath.Join(dir, "gone"), RunDir: filepath.Join(dir, "run")}
	for range 2 {
		if err := cleanup(context.Background(), cfg); err != nil {
			t.Error(err)
		}
	}
}

func TestParseCIDRs(t *testing.T) {
	if got, err := parseCIDRs(""); got != nil || err != nil {
		t.Errorf("none: %v, %v", got, err)
	}
	if got, err := parseCIDRs("198.19.3.0/24"); err != nil || !slices.Equal(got, []netip.Prefix{netip.MustParsePrefix("198.19.3.0/24")}) {
		t.Errorf("one: %v, %v", got, err)
	}
	if _, err := parseCIDRs("198.19.3.0"); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), "--pod-cidr") {
		t.Errorf("no range: %v", err)
	}
}
