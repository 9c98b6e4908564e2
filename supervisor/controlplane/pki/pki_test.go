package pki

import (
	"crypto/x509"
	"encoding/pem"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

var testLeaf = Leaf{
	File: "apiserver", CommonName: "kube-apiserver", Server: true, DNSNames: []string{"kubernetes"},
	Addresses: []netip.Addr{netip.MustParseAddr("198.18.0.1")},
}

func authority(t *testing.T, now time.Time) (string, *Authority) {
	t.Helper()
	dir := t.TempDir()
	a, err := EnsureAuthority(dir, "ca", "kubernetes", now)
	if err != nil {
		t.Fatal(err)
	}
	return dir, a
}

func TestAuthorityIsKept(t *testing.T) {
	now := time.Now()
	dir, a := authority(t, now)
	b, err := EnsureAuthority(dir, "ca", "kubernetes", now.Add(time.Hour))
	if err != nil || !b.cert.Equal(a.cert) {
		t.Fatalf("second call made another authority (err %v)", err)
	}
	st, err := os.Stat(filepath.Join(dir, "ca.key"))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("key has mode %v, want 0600 (err %v)", st.Mode(), err)
	}
}

func TestAuthorityIsNeverReplaced(t *testing.T) {
	now := time.Now()
	for name, spoil := range map[string]func(dir string) error{
		"key lost":     func(dir string) error { return os.Remove(filepath.Join(dir, "ca.key")) },
		"key garbled":  func(dir string) error { return os.WriteFile(filepath.Join(dir, "ca.key"), []byte("x"), 0o600) },
		"cert garbled": func(dir string) error { return os.WriteFile(filepath.Join(dir, "ca.crt"), []byte("x"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			dir, _ := authority(t, now)
			if err := spoil(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := EnsureAuthority(dir, "ca", "kubernetes", now); err == nil {
				t.Fatal("a damaged authority was accepted or replaced")
			}
		})
	}
	dir, _ := authority(t, now)
	if _, err := EnsureAuthority(dir, "ca", "kubernetes", now.Add(AuthorityLifetime+time.Hour)); err == nil {
		t.Fatal("an expired authority was accepted")
	}
}

func TestLeafRenewal(t *testing.T) {
	now := time.Now()
	for name, tc := range map[string]struct {
		change func(*Leaf)
		after  time.Duration
		spoil  func(dir string)
		want   bool
	}{
		"unchanged":            {after: time.Hour},
		"just over a third":    {after: CertificateLifetime*2/3 - 24*time.Hour},
		"under a third":        {after: CertificateLifetime*2/3 + 24*time.Hour, want: true},
		"clock before":         {after: -24 * time.Hour, want: true},
		"another address":      {change: func(l *Leaf) { l.Addresses = []netip.Addr{netip.MustParseAddr("198.18.0.2")} }, want: true},
		"another name":         {change: func(l *Leaf) { l.DNSNames = append(l.DNSNames, "more") }, want: true},
		"another organization": {change: func(l *Leaf) { l.Organizations = []string{"o"} }, want: true},
		"another usage":        {change: func(l *Leaf) { l.Client = true }, want: true},
		"crash between writes": {spoil: func(dir string) { os.Remove(filepath.Join(dir, "apiserver.crt")) }, want: true},
	} {
		t.Run(name, func(t *testing.T) {
			dir, a := authority(t, now.Add(-48*time.Hour))
			if renewed, err := a.Ensure(dir, testLeaf, now); err != nil || !renewed {
				t.Fatalf("first Ensure: renewed %v, err %v", renewed, err)
			}
			if tc.spoil != nil {
				tc.spoil(dir)
			}
			l := testLeaf
			l.DNSNames = slices.Clone(l.DNSNames)
			if tc.change != nil {
				tc.change(&l)
			}
			renewed, err := a.Ensure(dir, l, now.Add(tc.after))
			if err != nil || renewed != tc.want {
				t.Fatalf("renewed %v (err %v), want %v", renewed, err, tc.want)
			}
			if again, err := a.Ensure(dir, l, now.Add(tc.after)); err != nil || again {
				t.Fatalf("not stable: renewed again (err %v)", err)
			}
		})
	}
}

func TestLeafOfAnotherAuthorityIsReplaced(t *testing.T) {
	now := time.Now()
	dir, a := authority(t, now)
	if _, err := a.Ensure(dir, testLeaf, now); err != nil {
		t.Fatal(err)
	}
	other, err := EnsureAuthority(t.TempDir(), "ca", "kubernetes", now)
	if err != nil {
		t.Fatal(err)
	}
	if renewed, err := other.Ensure(dir, testLeaf, now); err != nil || !renewed {
		t.Fatalf("renewed %v, err %v", renewed, err)
	}
}

func TestLeafVerifies(t *testing.T) {
	now := time.Now()
	dir, a := authority(t, now)
	if _, err := a.Ensure(dir, testLeaf, now); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "apiserver.crt"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(a.PEM())
	for _, name := range []string{"kubernetes", "198.18.0.1"} {
		if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, DNSName: name, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestServiceAccountKeys(t *testing.T) {
	dir := t.TempDir()
	if err := EnsureServiceAccountKeys(dir); err != nil {
		t.Fatal(err)
	}
	pub, err := os.ReadFile(filepath.Join(dir, "sa.pub"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "sa.pub")); err != nil {
		t.Fatal(err)
	}
	if err := EnsureServiceAccountKeys(dir); err != nil {
		t.Fatal(err)
	}
	again, err := os.ReadFile(filepath.Join(dir, "sa.pub"))
	if err != nil || string(again) != string(pub) {
		t.Fatalf("sa.pub differs after it was made again (err %v)", err)
	}
	if err := os.Remove(filepath.Join(dir, "sa.key")); err != nil {
		t.Fatal(err)
	}
	if err := EnsureServiceAccountKeys(dir); err == nil || !strings.Contains(err.Error(), "backup") {
		t.Fatalf("a lost sa.key must be an error that names the cure, got %v", err)
	}
}
