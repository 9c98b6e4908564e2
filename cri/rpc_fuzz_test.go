package cri

import (
	"context"
	"fmt"
	"hash/fnv"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Words that stand in fuzzed requests for what has another name each time.
const (
	aSandbox   = "$sandbox"
	aContainer = "$container"
)

// An rpc is one method of the CRI as its service descriptor has it, so that
// none can be forgotten.
type rpc struct {
	name string
	call func(ctx context.Context, decode func(any) error) error
}

// A fuzzRig is a server over the fakes with one sandbox and one container that
// runs. Each input finds it so, and must leave nothing behind.
type fuzzRig struct {
	t      testing.TB
	dir    string
	host   *fakeHost
	server *Server
	rpcs   []rpc

	sandbox, container string
	goroutines         int
}

func newFuzzRig(t testing.TB) *fuzzRig {
	r := &fuzzRig{t: t, dir: t.TempDir(), host: newFakeHost()}
	r.open()
	t.Cleanup(func() {
		if err := r.server.Close(); err != nil {
			t.Error(err)
		}
	})
	r.base()
	r.goroutines = runtime.NumGoroutine()
	return r
}

func (r *fuzzRig) open() {
	s, err := New(context.Background(), Config{
		Driver: fakeDriver{r.host}, Network: fakeNetwork{r.host}, Images: fakeImages{r.host}, Ephemeral: fakeEphemeral{r.host},
		StateDir: filepath.Join(r.dir, "cri"), SecretsDir: filepath.Join(r.dir, "run"), KubeletRoot: filepath.Join(r.dir, "kubelet"), Version: "test",
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		r.t.Fatal(err)
	}
	s.store.db.NoSync = true
	r.server, r.rpcs = s, everyRPC(s)
}

// everyRPC reads the service descriptors.
func everyRPC(s *Server) []rpc {
	var out []rpc
	for _, service := range []struct {
		desc grpc.ServiceDesc
		impl any
	}{{runtimeapi.RuntimeService_ServiceDesc, &runtimeService{Server: s}}, {runtimeapi.ImageService_ServiceDesc, &imageService{Server: s}}} {
		for _, m := range service.desc.Methods {
			out = append(out, rpc{m.MethodName, func(ctx context.Context, decode func(any) error) error {
				resp, err := m.Handler(service.impl, ctx, decode, s.unaryEdge)
				if err == nil {
					err = sendable(resp)
				}
				return err
			}})
		}
		for _, m := range service.desc.Streams {
			out = append(out, rpc{m.StreamName, func(ctx context.Context, decode func(any) error) error {
				ctx, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
				defer cancel()
				info := &grpc.StreamServerInfo{FullMethod: "/" + service.desc.ServiceName + "/" + m.StreamName}
				return s.streamEdge(service.impl, &fuzzStream{ctx: ctx, decode: decode}, info, m.Handler)
			}})
		}
	}
	return out
}

// sendable is what gRPC does to an answer.
func sendable(m any) error {
	b, err := proto.Marshal(m.(proto.Message))
	if err == nil && len(b) > maxMessage {
		err = fmt.Errorf("an answer of %d bytes", len(b))
	}
	return err
}

type fuzzStream struct {
	ctx    context.Context
	decode func(any) error
}

func (s *fuzzStream) SetHeader(metadata.MD) error  { return nil }
func (s *fuzzStream) SendHeader(metadata.MD) error { return nil }
func (s *fuzzStream) SetTrailer(metadata.MD)       {}
func (s *fuzzStream) Context() context.Context     { return s.ctx }
func (s *fuzzStream) SendMsg(m any) error          { return sendable(m) }
func (s *fuzzStream) RecvMsg(m any) error          { return s.decode(m) }

// base makes the sandbox and the container that requests are about.
func (r *fuzzRig) base() {
	ctx, rt := context.Background(), &runtimeService{Server: r.server}
	sb, err := rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: podConfig(r.jail())})
	if err != nil {
		r.t.Fatal(err)
	}
	c, err := rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: sb.PodSandboxId, Config: ctrConfig("base")})
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
		r.t.Fatal(err)
	}
	r.sandbox, r.container = sb.PodSandboxId, c.ContainerId
}

// jail is where log directories lead; its client may choose any on a node.
func (r *fuzzRig) jail() string { return filepath.Join(r.dir, "jail") }

// place puts ids where words stand, and log directories into the jail.
func (r *fuzzRig) place(m protoreflect.Message) {
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.IsMap():
			if fd.MapValue().Kind() == protoreflect.MessageKind {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool { r.place(v.Message()); return true })
			}
		case fd.IsList():
			for i := range v.List().Len() {
				if fd.Kind() == protoreflect.MessageKind {
					r.place(v.List().Get(i).Message())
				}
			}
		case fd.Kind() == protoreflect.MessageKind:
			r.place(v.Message())
		case fd.Kind() == protoreflect.StringKind:
			s := strings.ReplaceAll(strings.ReplaceAll(v.String(), aSandbox, r.sandbox), aContainer, r.container)
			if fd.Name() == "log_directory" && filepath.IsAbs(s) && !strings.HasPrefix(s, r.jail()) && !hasDotDot(s) {
				s = r.jail() + s
			}
			m.Set(fd, protoreflect.ValueOfString(s))
		}
		return true
	})
}

// find returns the method that name means; the fuzzer's inventions mean one,
// too.
func (r *fuzzRig) find(name string) rpc {
	for _, m := range r.rpcs {
		if m.name == name {
			return m
		}
	}
	h := fnv.New32a()
	h.Write([]byte(name))
	return r.rpcs[int(h.Sum32()%uint32(len(r.rpcs)))]
}

// send makes one call with the bytes that a client sent, and holds its error
// against the contract: a code that tells what to do, which a fault of the
// server is not.
func (r *fuzzRig) send(t testing.TB, name string, wire []byte) {
	m := r.find(name)
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	malformed := false
	err := m.call(ctx, func(v any) error {
		if err := proto.Unmarshal(wire, v.(proto.Message)); err != nil {
			malformed = true
			return status.Error(codes.InvalidArgument, err.Error())
		}
		r.place(v.(proto.Message).ProtoReflect())
		return nil
	})
	if malformed {
		return // gRPC's own answer
	}
	r.judge(t, m.name, err)
}

func (r *fuzzRig) judge(t testing.TB, name string, err error) {
	t.Helper()
	switch code := status.Code(err); code {
	case codes.Unknown, codes.Internal, codes.DataLoss:
		t.Errorf("%s failed with %s: %.2000v", name, code, err)
	}
}

// restore checks what an input left, against what the lists show, and puts the
// rig back as it was.
func (r *fuzzRig) restore(t testing.TB) {
	t.Helper()
	ctx, rt := context.Background(), &runtimeService{Server: r.server}
	deadline := time.Now().Add(time.Minute)
	for r.busy() {
		if time.Now().After(deadline) {
			t.Fatal("a sandbox is being made or unmade without end")
		}
		time.Sleep(time.Millisecond)
	}
	for _, c := range r.server.store.allContainers() {
		if c.ID != r.container && c.SandboxID == r.sandbox {
			if _, err := rt.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.ID}); err != nil {
				t.Errorf("remove container: %v", err)
			}
		}
	}
	c, ok := r.server.store.container(r.container)
	sb, ready := r.server.store.sandbox(r.sandbox)
	keep := ok && c.State == runtimeapi.ContainerState_CONTAINER_RUNNING && ready && sb.State == runtimeapi.PodSandboxState_SANDBOX_READY
	for _, sb := range r.server.store.allSandboxes() {
		if sb.ID != r.sandbox || !keep {
			if _, err := rt.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: sb.ID}); err != nil {
				t.Errorf("remove sandbox: %v", err)
			}
		}
	}
	if !keep {
		if left := r.host.left(); len(left) > 0 {
			t.Errorf("no sandbox is listed, and the host has %q", left)
		}
		r.base()
	}
	r.checkHost(t)
	r.checkFiles(t)
	r.checkGoroutines(t)
}

func (r *fuzzRig) busy() bool {
	r.server.mu.Lock()
	defer r.server.mu.Unlock()
	return len(r.server.runs)+len(r.server.preps) > 0
}

// checkHost wants what the base sandbox has on the host and nothing else.
func (r *fuzzRig) checkHost(t testing.TB) {
	t.Helper()
	for _, l := range r.host.left() {
		if !strings.Contains(l, podUID) {
			t.Errorf("left on the host: %s", l)
		}
	}
	if in, err := r.server.store.intents(); err != nil || len(in) > 0 {
		t.Errorf("intents left: %v, %v", in, err)
	}
	g := r.host.guest(podUID)
	g.mu.Lock()
	defer g.mu.Unlock()
	for id := range g.containers {
		if id != r.container {
			t.Errorf("left in the guest: container %s", id)
		}
	}
}

// checkFiles wants no file where none belongs.
func (r *fuzzRig) checkFiles(t testing.TB) {
	t.Helper()
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !slices.Contains([]string{"cri", "run", "jail"}, e.Name()) {
			t.Errorf("a file outside its place: %s", e.Name())
		}
	}
	secrets, _ := os.ReadDir(filepath.Join(r.dir, "run"))
	if len(secrets) > 1 {
		t.Errorf("%d files of secrets for one container", len(secrets))
	}
	here, _ := os.ReadDir(".")
	for _, e := range here {
		if ext := filepath.Ext(e.Name()); ext != ".go" && e.Name() != "stream" && e.Name() != "testdata" && ext != ".test" {
			t.Errorf("a file in the working directory: %s", e.Name())
		}
	}
}

func (r *fuzzRig) checkGoroutines(t testing.TB) {
	t.Helper()
	const slack = 6 // timers' and grpc's own come and go
	for end := time.Now().Add(time.Minute); runtime.NumGoroutine() > r.goroutines+slack; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, %d at the start:\n%s", runtime.NumGoroutine(), r.goroutines, buf[:runtime.Stack(buf, true)])
		}
	}
}

// FuzzRPC sends any bytes to any method.
func FuzzRPC(f *testing.F) {
	for name, list := range rpcSeeds() {
		for _, m := range list {
			wire, err := proto.Marshal(m)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(name, wire)
		}
	}
	f.Add("PullImage", []byte{0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f})
	r := newFuzzRig(f)
	f.Fuzz(func(t *testing.T, name string, wire []byte) {
		r.t = t
		r.send(t, name, wire)
		r.restore(t)
	})
}

// A method without a seed is one that nobody thought of.
func TestEveryRPCHasASeed(t *testing.T) {
	seeds := rpcSeeds()
	r := newFuzzRig(t)
	for _, m := range r.rpcs {
		if len(seeds[m.name]) == 0 {
			t.Errorf("%s has no seed in rpcSeeds", m.name)
		}
		delete(seeds, m.name)
	}
	for name := range seeds {
		t.Errorf("rpcSeeds has %s, which the CRI has not", name)
	}
	if len(r.rpcs) < 41 {
		t.Errorf("%d methods: the descriptors were not read", len(r.rpcs))
	}
}
