package main

import (
	"crypto/tls"
	"fmt"
	"time"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// streamTLS loads the streaming server's certificate; nil when there is to be
// none.
func streamTLS(c v1alpha1.StreamingConfiguration) (*tls.Config, error) {
	if c.CertFile == "" {
		return nil, nil
	}
	cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("streaming.certFile and streaming.keyFile: %w", err)
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}, nil
}

// duration of a setting that was validated; 0 when it is empty.
func duration(s string) time.Duration {
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0
	}
	return d
}
