package vcsim

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// certificate returns what is shown to clients and the PEM they trust: the
// configured pair, or a self-signed certificate, kept in dir if there is one.
func (c Config) certificate(now time.Time) (tls.Certificate, []byte, error) {
	if c.Certificate != nil {
		return *c.Certificate, c.CA, nil
	}
	var file string
	if c.Dir != "" {
		file = filepath.Join(c.Dir, "self-signed.pem")
		b, err := os.ReadFile(file)
		if err == nil {
			if cert, err := tls.X509KeyPair(b, b); err == nil && now.Before(cert.Leaf.NotAfter) && cert.Leaf.VerifyHostname(c.Listen.Addr().String()) == nil {
				return cert, pemOf(cert), nil
			}
		} else if !errors.Is(err, fs.ErrNotExist) {
			return tls.Certificate{}, nil, fmt.Errorf("vcsim: certificate: %w", err)
		}
	}
	cert, key, err := selfSigned(c.Listen.Addr().AsSlice(), now)
	if err != nil {
		return tls.Certificate{}, nil, fmt.Errorf("vcsim: make a certificate: %w", err)
	}
	if file != "" {
		if err := writeFile(file, append(key, pemOf(cert)...)); err != nil {
			return tls.Certificate{}, nil, err
		}
	}
	return cert, pemOf(cert), nil
}

func pemOf(cert tls.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]})
}

func selfSigned(ip net.IP, now time.Time) (tls.Certificate, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "Atoll embedded vCenter"},
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.AddDate(5, 0, 0),
		IsCA:         true, BasicConstraintsValid: true, // it is its own authority
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		IPAddresses: []net.IP{ip},
		DNSNames:    []string{"localhost"},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	pk, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pk}), nil
}

// thumbprint is how vSphere writes a certificate's SHA-256.
func thumbprint(der []byte) string {
	sum := sha256.Sum256(der)
	return strings.ReplaceAll(strings.ToUpper(fmt.Sprintf("% x", sum[:])), " ", ":")
}
