package controlplane

import (
	"bytes"
	"fmt"
	"os"
	"testing"

	"github.com/containerd/errdefs"
)

func TestBackupNames(t *testing.T) {
	for name, want := range map[string]int64{
		"pki/ca.key":                maxSmallBytes,
		"pki/a/b":                   maxSmallBytes,
		"pki/../etcd":               -1,
		"cluster.json":              -1,
		"/pki/ca.key":               -1,
		"vcenter/inventory.journal": maxVCenter,
		"vcenter/users.json":        maxVCenter,
		"vcenter/admin.password":    maxVCenter,
		"vcenter/lock":              -1,
		"vcenter/../users.json":     -1,
		"vcenter/a/users.json":      -1,
	} {
		if got := maxSize(name); got != want {
			t.Errorf("%s: at most %d bytes, want %d", name, got, want)
		}
		h := BackupHeader{Files: []BackupFile{{Name: snapshotName}, {Name: name, Size: max(want, 0) + 1}}}
		if err := checkNames("f", h); !errdefs.IsDataLoss(err) {
			t.Errorf("%s with a byte more: %v", name, err)
		}
	}
}

// asFormat makes a backup one of another format with the same entries.
func asFormat(t *testing.T, file string, format int) {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	old := bytes.Replace(content, fmt.Appendf(nil, `"format": %d`, backupFormat), fmt.Appendf(nil, `"format": %d`, format), 1)
	if bytes.Equal(old, content) {
		t.Fatal("no format in the header")
	}
	if err := os.WriteFile(file, old, 0o600); err != nil {
		t.Fatal(err)
	}
}
