package controlplane

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// Names that a restored member must share with the running one.
const (
	etcdMember = "atoll-1"
	// A single member has no peers and listens for none; etcd wants the
	// address all the same, as metadata.
	etcdPeerURL   = "https://127.0.0.1:2380"
	etcdClientURL = "https://127.0.0.1:2379"
	etcdToken     = "atoll"

	// etcdQuota is twice etcd's default; etcd's own advice ends at 8 GiB
	// (etcd.io/docs/v3.6/dev-guide/limit).
	etcdQuota        = 4 << 30
	etcdStartTimeout = time.Minute
	etcdStopTimeout  = time.Second
)

// startEtcd returns when etcd serves on its socket.
func startEtcd(ctx context.Context, c Config) (*embed.Etcd, error) {
	cfg := embed.NewConfig()
	cfg.Name = etcdMember
	cfg.Dir = c.etcdDir()
	cfg.ListenClientUrls = []url.URL{{Scheme: "unix", Path: c.etcdSocket()}}
	cfg.AdvertiseClientUrls = mustURLs(etcdClientURL)
	cfg.ListenPeerUrls = nil
	cfg.AdvertisePeerUrls = mustURLs(etcdPeerURL)
	cfg.InitialCluster = cfg.InitialClusterFromName(etcdMember)
	cfg.InitialClusterToken = etcdToken
	cfg.QuotaBackendBytes = etcdQuota
	cfg.LogLevel = "warn"
	cfg.LogOutputs = []string{embed.StdErrLogOutput}
	// A lone member waits for one election at every start: 50 to 300 ms with
	// these instead of 0.1 to 1.1 s. The ticks cost nothing that can be measured.
	cfg.TickMs, cfg.ElectionMs = 50, 250
	// NewConfig leaves 0, which logs every request.
	cfg.WarningUnaryRequestDuration = 500 * time.Millisecond
	// The API server compacts every five minutes itself.
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, fmt.Errorf("etcd on %s: %w", c.etcdDir(), err)
	}
	select {
	case <-e.Server.ReadyNotify():
	case err := <-e.Err():
		e.Close()
		return nil, fmt.Errorf("etcd on %s: %w", c.etcdDir(), err)
	case <-time.After(etcdStartTimeout):
		e.Close()
		return nil, fmt.Errorf("etcd on %s was not ready within %s", c.etcdDir(), etcdStartTimeout)
	case <-ctx.Done():
		e.Close()
		return nil, ctx.Err()
	}
	// Its directory is 0700 all along; this keeps the promise for the socket alone.
	if err := os.Chmod(c.etcdSocket(), 0o600); err != nil {
		e.Close()
		return nil, fmt.Errorf("etcd: %w", err)
	}
	return e, nil
}

// waitEtcd blocks until ctx ends or etcd fails.
func waitEtcd(ctx context.Context, e *embed.Etcd) error {
	select {
	case <-ctx.Done():
		return nil
	case err := <-e.Err():
		return err
	case <-e.Server.StopNotify():
		return errors.New("its server ended")
	}
}

// stopEtcd ends etcd within etcdStopTimeout: Close alone waits seven seconds
// for clients that do not go.
func stopEtcd(e *embed.Etcd) {
	closed := make(chan struct{})
	go func() { e.Close(); close(closed) }()
	select {
	case <-closed:
	case <-time.After(etcdStopTimeout):
		e.Server.HardStop()
	}
}

// etcdClient talks to the running etcd from any network namespace.
func etcdClient(c Config) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints:   []string{c.etcdEndpoint()},
		DialTimeout: 2 * time.Second,
		DialOptions: []grpc.DialOption{grpc.WithDisableServiceConfig()},
		Logger:      zap.NewNop(),
	})
}

func mustURLs(s string) []url.URL {
	u, err := url.Parse(s)
	if err != nil {
		panic(err) // a constant of this file
	}
	return []url.URL{*u}
}
