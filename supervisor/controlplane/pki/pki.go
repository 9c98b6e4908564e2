// Package pki makes and renews the authorities, certificates and keys of a
// cluster, as files that kubeadm would recognise. Keys are ECDSA P-256 in
// files of mode 0600.
package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/supervisor/controlplane/durable"
)

// Lifetimes as kubeadm's (cmd/kubeadm/app/constants: CertificateValidity and
// CACertificateValidityPeriod).
const (
	AuthorityLifetime   = 10 * 365 * 24 * time.Hour
	CertificateLifetime = 365 * 24 * time.Hour
	// skew is how far a peer's clock may be behind ours.
	skew = 5 * time.Minute
)

// An Authority signs certificates. Its files are Name.crt and Name.key.
type Authority struct {
	Name string
	cert *x509.Certificate
	key  crypto.Signer
}

// A Leaf says what one certificate must be.
type Leaf struct {
	// File is the path below the directory, without ".crt" and ".key".
	File          string
	CommonName    string
	Organizations []string
	Client        bool
	Server        bool
	DNSNames      []string
	Addresses     []netip.Addr
}

// EnsureAuthority loads dir/name.crt and .key, or makes both when neither is
// there. One that is there alone, does not fit, is no authority or has expired
// at now is an error: replacing it would cut off every node.
func EnsureAuthority(dir, name, commonName string, now time.Time) (*Authority, error) {
	base := filepath.Join(dir, name)
	cert, key, err := load(base)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !exists(base+".crt"):
		return newAuthority(dir, name, commonName, now)
	case err != nil:
		return nil, fmt.Errorf("authority %s.crt and .key: %w: restore both from a backup", base, err)
	case !cert.IsCA:
		return nil, fmt.Errorf("%s.crt is no certificate authority: restore it from a backup: %w", base, errdefs.ErrInvalidArgument)
	case now.After(cert.NotAfter):
		return nil, fmt.Errorf("authority %s.crt expired on %s: check the host's clock, or rotate the authority by hand: %w", base, cert.NotAfter.Format(time.RFC3339), errdefs.ErrFailedPrecondition)
	}
	return &Authority{Name: name, cert: cert, key: key}, nil
}

func newAuthority(dir, name, commonName string, now time.Time) (*Authority, error) {
	// A key without its certificate is what a crash between the two writes
	// left: nothing was ever signed with it.
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: commonName},
		DNSNames:              []string{commonName},
		NotBefore:             now.Add(-skew),
		NotAfter:              now.Add(AuthorityLifetime),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	if err := save(filepath.Join(dir, name), der, key); err != nil {
		return nil, err
	}
	return &Authority{Name: name, cert: cert, key: key}, nil
}

// PEM is the authority's certificate.
func (a *Authority) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// NotAfter is when the authority expires.
func (a *Authority) NotAfter() time.Time { return a.cert.NotAfter }

// Ensure issues the leaf's certificate and key unless those that are there
// are as the leaf says, signed by this authority, and have a third of their
// life left at now. It reports whether it wrote. The key's file is written
// before the certificate's; whoever reloads them sees a pair that does not
// fit for at most that moment.
func (a *Authority) Ensure(dir string, l Leaf, now time.Time) (renewed bool, err error) {
	base := filepath.Join(dir, l.File)
	if cert, _, err := load(base); err == nil && a.good(cert, l, now) {
		return false, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return false, err
	}
	template, err := l.template(now)
	if err != nil {
		return false, err
	}
	if template.NotAfter.After(a.cert.NotAfter) {
		template.NotAfter = a.cert.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return false, fmt.Errorf("certificate %s: %w", base, err)
	}
	return true, save(base, der, key)
}

// good says whether cert may stay.
func (a *Authority) good(cert *x509.Certificate, l Leaf, now time.Time) bool {
	want, err := l.template(now)
	if err != nil || cert.CheckSignatureFrom(a.cert) != nil {
		return false
	}
	life := cert.NotAfter.Sub(cert.NotBefore)
	return cert.NotAfter.Sub(now) > life/3 && !now.Before(cert.NotBefore) &&
		cert.Subject.CommonName == want.Subject.CommonName &&
		slices.Equal(cert.Subject.Organization, want.Subject.Organization) &&
		slices.Equal(cert.ExtKeyUsage, want.ExtKeyUsage) &&
		slices.Equal(cert.DNSNames, want.DNSNames) &&
		slices.EqualFunc(cert.IPAddresses, want.IPAddresses, net.IP.Equal)
}

func (l Leaf) template(now time.Time) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: l.CommonName, Organization: l.Organizations},
		DNSNames:     l.DNSNames,
		NotBefore:    now.Add(-skew),
		NotAfter:     now.Add(CertificateLifetime),
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}
	if l.Client {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	}
	if l.Server {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	for _, a := range l.Addresses {
		t.IPAddresses = append(t.IPAddresses, net.IP(a.AsSlice()))
	}
	return t, nil
}

// EnsureServiceAccountKeys makes dir/sa.key and sa.pub. A lost sa.pub is made
// again from sa.key; a sa.key that is there is never replaced, because every
// token of the cluster is signed with it.
func EnsureServiceAccountKeys(dir string) error {
	keyFile, pubFile := filepath.Join(dir, "sa.key"), filepath.Join(dir, "sa.pub")
	key, err := loadKey(keyFile)
	if errors.Is(err, fs.ErrNotExist) {
		if exists(pubFile) {
			return fmt.Errorf("%s is missing beside %s: restore it from a backup: %w", keyFile, pubFile, errdefs.ErrFailedPrecondition)
		}
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err == nil {
			err = saveKey(keyFile, key)
		}
	}
	if err != nil {
		return fmt.Errorf("service account key %s: %w", keyFile, err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	want := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	if have, err := os.ReadFile(pubFile); err == nil && bytes.Equal(have, want) {
		return nil
	}
	return durable.WriteFile(pubFile, want, 0o644)
}

func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
}

func exists(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}

// load reads base.key and base.crt, which must belong together.
func load(base string) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := loadKey(base + ".key")
	if err != nil {
		return nil, nil, err
	}
	b, err := os.ReadFile(base + ".crt")
	if err != nil {
		return nil, nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, nil, fmt.Errorf("%s.crt holds no PEM certificate: %w", base, errdefs.ErrInvalidArgument)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, nil, fmt.Errorf("%s.crt: %v: %w", base, err, errdefs.ErrInvalidArgument)
	}
	if pub, ok := cert.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(key.Public()) {
		return nil, nil, fmt.Errorf("%s.crt and %s.key do not belong together: %w", base, base, errdefs.ErrInvalidArgument)
	}
	return cert, key, nil
}

func loadKey(file string) (*ecdsa.PrivateKey, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "EC PRIVATE KEY" {
		return nil, fmt.Errorf("%s holds no PEM EC private key: %w", file, errdefs.ErrInvalidArgument)
	}
	key, err := x509.ParseECPrivateKey(block.Bytes)
	if err != nil {
		// The parser's message is left out: it must not repeat key bytes.
		return nil, fmt.Errorf("%s cannot be parsed: %w", file, errdefs.ErrInvalidArgument)
	}
	return key, nil
}

func save(base string, der []byte, key *ecdsa.PrivateKey) error {
	if err := saveKey(base+".key", key); err != nil {
		return err
	}
	return durable.WriteFile(base+".crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
}

func saveKey(file string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return durable.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}
