package vsphere

import (
	"bytes"
	"crypto/sha1" //nolint:gosec // what vSphere's clients show as a thumbprint
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
)

// tlsConfig trusts what signs with ca (PEM; empty: the system's authorities),
// or the one certificate that has the thumbprint (SHA-256 or SHA-1, in hex,
// colons or not).
func tlsConfig(ca []byte, thumbprint string) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if thumbprint != "" {
		pin, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(thumbprint), ":", ""))
		if err != nil || len(pin) != sha1.Size && len(pin) != sha256.Size {
			return nil, fmt.Errorf("thumbprint %q: give the SHA-256 or SHA-1 of vCenter's certificate in hex: %w", thumbprint, errdefs.ErrInvalidArgument)
		}
		// The pin takes the place of a chain to an authority, not of the check.
		c.InsecureSkipVerify = true
		c.VerifyConnection = func(s tls.ConnectionState) error { return matches(pin, s.PeerCertificates) }
		return c, nil
	}
	if len(bytes.TrimSpace(ca)) > 0 {
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(ca) {
			return nil, fmt.Errorf("the CA holds no certificate: give vCenter's, in PEM: %w", errdefs.ErrInvalidArgument)
		}
	}
	return c, nil
}

// A thumbprintError is a certificate that is not the pinned one.
type thumbprintError struct{ have [sha256.Size]byte }

func (e *thumbprintError) Error() string {
	return fmt.Sprintf("its certificate has another thumbprint than the one that was given (SHA-256 %X): if vCenter's certificate was renewed, give the new one", e.have)
}

func matches(pin []byte, chain []*x509.Certificate) error {
	if len(chain) == 0 {
		return errors.New("the server shows no certificate")
	}
	long, short := sha256.Sum256(chain[0].Raw), sha1.Sum(chain[0].Raw) //nolint:gosec // an administrator who gave one trusts it
	if bytes.Equal(pin, long[:]) || bytes.Equal(pin, short[:]) {
		return nil
	}
	return &thumbprintError{long}
}
