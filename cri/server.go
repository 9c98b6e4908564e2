package cri

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/cri/stream"
	"github.com/openatoll/atoll/netplugin"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
)

// RuntimeName is what Version answers.
const RuntimeName = "atoll"

// maxMessage is the largest message on the CRI socket; the kubelet's client
// uses the same bound.
const maxMessage = 16 << 20

// Config is what a Server is made of. Driver, Network, Images, Ephemeral and
// StateDir are required.
type Config struct {
	Driver    vmpod.Driver
	Network   netplugin.Network
	Images    storage.Images
	Ephemeral storage.Ephemeral
	// Disks keeps the volumes that outlive pods, and Formatter makes their file
	// systems. Nil: pods that want such volumes are refused.
	Disks     Disks
	Formatter Formatter
	// NodeName is under which name this host holds disks.
	NodeName string
	// StateDir holds cri.db (mode 0600); the server makes it.
	StateDir string
	// SecretsDir (mode 0700; the server makes it) takes what of containers may
	// hold secrets, for the next server's execs. It should be on a tmpfs.
	// Empty: that is kept in memory alone.
	SecretsDir string
	// KubeletRoot is the kubelet's root directory: mounts below its pods
	// directory are known for what they are. Empty: there is no kubelet.
	KubeletRoot string
	// HostDirectories are what containers may mount of this host as it is; the
	// Driver must have been given the same. Empty: small directories are copied
	// into the guest for clients that are no kubelet, and refused to others.
	HostDirectories []vmpod.HostDirectory
	// DefaultEphemeralBytes is the writable disk of a pod that sets no limit;
	// default 10 GiB, sparse.
	DefaultEphemeralBytes int64
	// GuestOverhead is what a guest keeps for itself, in bytes, when its
	// containers may use memory bytes. Used only without a Hint.
	GuestOverhead func(memory int64) int64
	// PrepareTTL is how long a preparation waits for its sandbox; default 5
	// minutes.
	PrepareTTL time.Duration
	// BootTimeout bounds the time from Launch to the agent's answer; default
	// 90 s (a loaded host without KVM).
	BootTimeout time.Duration
	// StartsAtOnce is how many steps of pods' starts work in their guests at
	// once; 0, the default, is any number. It is for guests that are emulated.
	StartsAtOnce int
	// StreamAddr is where exec, attach and port-forward are served; default
	// 127.0.0.1:0. It must be a loopback address: who has a URL's token is let
	// in.
	StreamAddr string
	// StreamIdleTimeout ends a stream over which nothing went for so long;
	// default 0, none.
	StreamIdleTimeout time.Duration
	// StreamTLS makes streams HTTPS. Nil: plain HTTP, on loopback alone.
	StreamTLS *tls.Config
	// Version is answered as the runtime's version.
	Version string
	// Info is shown by `crictl info`, next to what the server knows: the
	// accelerator, the guest kernel and the like.
	Info func() map[string]string
	// ServerOptions are added to those of the gRPC server. With a stats handler
	// that puts a span into the context of calls, there are spans below it for
	// the steps of RunPodSandbox and for calls to the guest's agent.
	ServerOptions []grpc.ServerOption
	// Logger; default slog.Default().
	Logger *slog.Logger

	pace pace // see watchHealth; the tests' own are faster
}

// A Server is the CRI of one host. It also is a vmpod.Preparer.
type Server struct {
	config  Config
	log     *slog.Logger
	store   *store
	streams *stream.Server
	watch   *treeWatcher
	samples *cpuSamples
	faults  *feed[vmpod.Fault]
	starts  *feed[vmpod.Start]
	podVMs  *feed[string] // ids of sandboxes whose VM is new or has grown
	damages *feed[storage.Damage]
	boots   bootIDs
	turns   *turns

	// ctx lives as long as the server; what outlives an RPC runs under it.
	ctx        context.Context
	cancel     context.CancelFunc
	background sync.WaitGroup

	mu    sync.Mutex
	pods  map[string]*pod // by sandbox ID; only what has a machine
	preps map[vmpod.ID]*preparation
	runs  map[vmpod.ID]*flight
	hints map[string]*vmpod.Hint // by pod UID
	owed  map[vmpod.ID]bool      // what is still to be taken back

	grpcMu sync.Mutex
	grpc   []*grpc.Server

	fsMu   sync.Mutex
	fsPath string // see containerFS
}

var _ vmpod.Preparer = (*Server)(nil)

// New opens the state, finds the machines that run, adopts those that belong
// to a known sandbox and takes back what was left half made. It returns an
// error, having touched nothing, when the hypervisor's list cannot be had: an
// unsynced list is no ground to act on.
func New(ctx context.Context, config Config) (*Server, error) {
	if config.Driver == nil || config.Network == nil || config.Images == nil || config.Ephemeral == nil || config.StateDir == "" {
		return nil, fmt.Errorf("cri: Driver, Network, Images, Ephemeral and StateDir are required: %w", errdefs.ErrInvalidArgument)
	}
	config.setDefaults()
	if err := os.MkdirAll(config.StateDir, 0o700); err != nil {
		return nil, err
	}
	st, fresh, err := openStore(filepath.Join(config.StateDir, "cri.db"), secretStore{config.SecretsDir})
	if err != nil {
		return nil, err
	}
	s := &Server{
		config:  config,
		log:     config.Logger,
		store:   st,
		samples: newCPUSamples(),
		faults:  newFeed[vmpod.Fault](),
		starts:  newFeed[vmpod.Start](),
		podVMs:  newFeed[string](),
		damages: newFeed[storage.Damage](),
		turns:   newTurns(config.StartsAtOnce, turnLimit),
		pods:    map[string]*pod{},
		preps:   map[vmpod.ID]*preparation{},
		runs:    map[vmpod.ID]*flight{},
		hints:   map[string]*vmpod.Hint{},
		owed:    map[vmpod.ID]bool{},
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.background.Go(s.keepRecording)
	if s.watch, err = newTreeWatcher(s); err == nil {
		s.streams, err = stream.New(stream.Options{Addr: config.StreamAddr, IdleTimeout: config.StreamIdleTimeout, TLS: config.StreamTLS}, streamRuntime{s}, s.log)
	}
	if err == nil {
		err = s.adopt(ctx, fresh)
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	s.followDamage()
	return s, nil
}

func (c *Config) setDefaults() {
	if c.DefaultEphemeralBytes <= 0 {
		c.DefaultEphemeralBytes = defaultEphemeral
	}
	if c.GuestOverhead == nil {
		c.GuestOverhead = defaultGuestOverhead
	}
	if c.PrepareTTL <= 0 {
		c.PrepareTTL = 5 * time.Minute
	}
	if c.BootTimeout <= 0 {
		c.BootTimeout = 90 * time.Second
	}
	if c.StreamAddr == "" {
		c.StreamAddr = "127.0.0.1:0"
	}
	if c.Version == "" {
		c.Version = "0.0.0"
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.pace == (pace{}) {
		c.pace = defaultPace
	}
}

// Listen makes the unix socket for Serve, mode 0600, replacing one that a
// dead process left.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		conn.Close()
		return nil, fmt.Errorf("CRI socket %s is served by another process: stop it or choose another socket: %w", path, errdefs.ErrAlreadyExists)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	// The directory is closed while the socket has not got its mode yet.
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Serve answers on l until ctx ends, l fails or Close is called; RPCs under way
// are given a second to end. It may be called for several listeners.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	srv := grpc.NewServer(append([]grpc.ServerOption{
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.ChainUnaryInterceptor(s.unaryEdge),
		grpc.ChainStreamInterceptor(s.streamEdge),
	}, s.config.ServerOptions...)...)
	runtimeapi.RegisterRuntimeServiceServer(srv, &runtimeService{Server: s})
	runtimeapi.RegisterImageServiceServer(srv, &imageService{Server: s})
	s.grpcMu.Lock()
	s.grpc = append(s.grpc, srv)
	s.grpcMu.Unlock()

	stop := context.AfterFunc(ctx, func() { stopGracefully(srv) })
	defer stop()
	if s.ctx.Err() != nil {
		srv.Stop()
	}
	err := srv.Serve(l)
	if errors.Is(err, grpc.ErrServerStopped) || ctx.Err() != nil {
		return nil
	}
	return err
}

func stopGracefully(srv *grpc.Server) {
	t := time.AfterFunc(time.Second, srv.Stop)
	defer t.Stop()
	srv.GracefulStop()
}

// Close ends the server. Pods keep running: the next New adopts them.
// Preparations that no sandbox has used are taken back at the next start.
func (s *Server) Close() error {
	s.grpcMu.Lock()
	for _, srv := range s.grpc {
		stopGracefully(srv)
	}
	s.grpcMu.Unlock()
	s.cancel()
	var err error
	if s.streams != nil {
		err = s.streams.Close()
	}
	s.mu.Lock()
	pods := make([]*pod, 0, len(s.pods))
	for _, p := range s.pods {
		pods = append(pods, p)
	}
	s.mu.Unlock()
	for _, p := range pods {
		p.close(errServerClosed)
	}
	if s.watch != nil {
		s.watch.close()
	}
	s.background.Wait()
	for _, p := range s.preps { // nobody else is left
		if p.kit != nil && p.kit.link != nil {
			p.expire.Stop()
			p.kit.link.close(errServerClosed)
		}
	}
	return errors.Join(err, s.store.close())
}

var errServerClosed = errors.New("the runtime is shutting down")

// runtimeService and imageService are the two gRPC services of one server.
type runtimeService struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	*Server
}

type imageService struct {
	runtimeapi.UnimplementedImageServiceServer
	*Server
}
