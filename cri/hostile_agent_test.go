package cri

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/internal/heappeak"
	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// hostileUID is the pod whose guest means harm; podUID is its neighbour.
const hostileUID = "bad-bad-bad"

// A hostileDriver has the guests of hostileUID served by somebody else.
type hostileDriver struct {
	fakeDriver
	serve func(conn net.Conn, m *fakeMachine)
}

type hostileMachine struct {
	*fakeMachine
	serve func(conn net.Conn, m *fakeMachine)
}

func (d hostileDriver) Launch(ctx context.Context, spec vmpod.Spec) (vmpod.Machine, error) {
	m, err := d.fakeDriver.Launch(ctx, spec)
	if err == nil && spec.ID.PodUID == hostileUID {
		return &hostileMachine{m.(*fakeMachine), d.serve}, nil
	}
	return m, err
}

// Dial is a real socket pair's worth of channel: what the guest sends is
// buffered and taken apart anyhow.
func (m *hostileMachine) Dial(ctx context.Context) (net.Conn, error) {
	l, err := net.Listen("unix", "") // a name that the kernel chooses; loopback may be down here
	if err != nil {
		return nil, err
	}
	defer l.Close()
	host, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		return nil, err
	}
	guest, err := l.Accept()
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	if m.conn != nil {
		m.conn.Close()
	}
	m.conn = guest
	m.mu.Unlock()
	go m.serve(guest, m.fakeMachine)
	return host, nil
}

// A meddler passes on what an honest agent says, and puts in its own when it
// is armed.
type meddler struct {
	net.Conn
	mu sync.Mutex
}

func (c *meddler) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.Conn.Write(p)
}

func badPod(dir string) *runtimeapi.PodSandboxConfig {
	c := podConfig(dir)
	c.Metadata.Uid, c.Metadata.Name = hostileUID, "bad"
	c.Labels = nil
	return c
}

// neighbours starts a good pod and a bad one, with a container each.
func (s *testServer) neighbours(t *testing.T) (good, bad, goodCtr, badCtr string) {
	t.Helper()
	good = s.run(t)
	r, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: badPod(s.dir)})
	if err != nil {
		t.Fatal(err)
	}
	bad = r.PodSandboxId
	goodCtr, badCtr = s.create(t, good, ctrConfig("good")), s.create(t, bad, ctrConfig("bad"))
	s.start(t, goodCtr)
	s.start(t, badCtr)
	return good, bad, goodCtr, badCtr
}

// unharmed checks that the neighbour is as it was and works.
func (s *testServer) unharmed(t *testing.T, sandbox, container string) {
	t.Helper()
	sb, err := s.rt.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: sandbox})
	if err != nil || sb.Status.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Errorf("the neighbour: %v, %v", sb.GetStatus().GetState(), err)
	}
	if c := s.status(t, container); c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the neighbour's container is %v: %s", c.State, c.Message)
	}
	x, err := s.rt.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: container, Cmd: []string{"echo", "well"}, Timeout: 20})
	if err != nil || string(x.Stdout) != "well" {
		t.Errorf("exec in the neighbour: %q, %v", x.GetStdout(), err)
	}
}

// heapWithin runs do and fails if the heap stood higher than limit above its
// start at any sampled moment.
func heapWithin(t *testing.T, limit uint64, do func()) {
	t.Helper()
	grew := heappeak.Of(do)
	t.Logf("heap at most %d MiB above its start", grew>>20)
	if grew > limit {
		t.Errorf("the heap grew by %d MiB; at most %d are right", grew>>20, limit>>20)
	}
}

func muxFrame(typ byte, flags uint16, stream, length uint32, body string) string {
	h := []byte{0, typ}
	h = binary.BigEndian.AppendUint16(h, flags)
	h = binary.BigEndian.AppendUint32(h, stream)
	return string(binary.BigEndian.AppendUint32(h, length)) + body
}

// rpcFrame is a ttrpc answer's head on the session's first stream.
func rpcFrame(length, stream uint32, kind byte) string {
	h := binary.BigEndian.AppendUint32(nil, length)
	h = append(binary.BigEndian.AppendUint32(h, stream), kind, 0)
	return muxFrame(0, 0, 1, uint32(len(h)), string(h))
}

// A guest that speaks nonsense costs its pod, with a reason, and nobody else.
func TestAgentThatBreaksTheProtocol(t *testing.T) {
	for name, evil := range map[string]string{
		"garbage":             "\xde\xad\xbe\xef" + strings.Repeat("garbage", 1000),
		"a frame of 4 GiB":    muxFrame(0, 0, 1, 0xffffffff, "x"),
		"a stream of its own": muxFrame(1, 1, 2, 0, ""),
		"pings without end":   strings.Repeat(muxFrame(2, 1, 0, 7, ""), 100_000),
		"100 MB of stats":     rpcFrame(100<<20, 3, 2) + strings.Repeat(muxFrame(0, 0, 1, 60000, strings.Repeat("s", 60000)), 20),
		"an unasked answer":   rpcFrame(5, 0x7ffffff1, 2),
		"a request":           rpcFrame(5, 3, 1),
	} {
		t.Run(name, func(t *testing.T) {
			h, dir := newFakeHost(), t.TempDir()
			var armed atomic.Bool
			var attaches atomic.Int32
			s := serve(t, h, dir, func(c *Config) {
				c.Driver = hostileDriver{fakeDriver{h}, func(conn net.Conn, m *fakeMachine) {
					attaches.Add(1)
					w := &meddler{Conn: conn}
					ended := make(chan struct{})
					go func() {
						defer close(ended)
						agentapi.Serve(context.Background(), w, m.guest, func(string, ...any) {})
					}()
					for !armed.Load() {
						select {
						case <-ended:
							return
						case <-time.After(time.Millisecond):
						}
					}
					time.Sleep(20 * time.Millisecond) // the session has begun
					io.WriteString(w, evil)
				}}
			})
			good, bad, goodCtr, badCtr := s.neighbours(t)
			heapWithin(t, 64<<20, func() {
				armed.Store(true)
				eventually(t, "the sandbox is given up", func() bool {
					sb, ok := s.store.sandbox(bad)
					return ok && sb.State != runtimeapi.PodSandboxState_SANDBOX_READY
				})
			})
			sb, _ := s.store.sandbox(bad)
			if sb.Reason != string(vmpod.ExitAgentWrong) || !strings.Contains(sb.Message, "broke the protocol") {
				t.Errorf("reason %q: %s", sb.Reason, sb.Message)
			}
			if c := s.status(t, badCtr); c.State != runtimeapi.ContainerState_CONTAINER_EXITED || c.ExitCode == 0 || c.Reason != string(vmpod.ExitAgentWrong) {
				t.Errorf("its container: %v, code %d, %q", c.State, c.ExitCode, c.Reason)
			}
			if n := attaches.Load(); n > 20 { // what comes before the echo is skipped, and does not count
				t.Errorf("%d attaches", n)
			}
			s.unharmed(t, good, goodCtr)
			s.remove(t, bad)
			for _, l := range h.left() {
				if strings.Contains(l, hostileUID) {
					t.Errorf("left: %s", l)
				}
			}
		})
	}
}

// A guest that is hostile from its first byte never becomes a sandbox.
func TestAgentThatNeverAnswers(t *testing.T) {
	for name, c := range map[string]struct {
		serve func(conn net.Conn, m *fakeMachine)
		says  string
	}{
		"floods": {func(conn net.Conn, _ *fakeMachine) {
			for block := bytes.Repeat([]byte("flood"), 1<<15); ; {
				if _, err := conn.Write(block); err != nil {
					return
				}
			}
		}, "broke the protocol"},
		"drips": {func(conn net.Conn, _ *fakeMachine) {
			for {
				if _, err := conn.Write([]byte{0xf5}); err != nil {
					return
				}
				time.Sleep(5 * time.Millisecond)
			}
		}, "did not answer within"},
		"hangs up": {func(conn net.Conn, _ *fakeMachine) { conn.Close() }, "did not answer within"},
		"is silent": {func(conn net.Conn, _ *fakeMachine) {
			_, _ = io.Copy(io.Discard, conn)
		}, "did not answer within"},
	} {
		t.Run(name, func(t *testing.T) {
			h, dir := newFakeHost(), t.TempDir()
			s := serve(t, h, dir, func(cfg *Config) {
				cfg.Driver, cfg.BootTimeout = hostileDriver{fakeDriver{h}, c.serve}, 3*time.Second
			})
			var err error
			heapWithin(t, 64<<20, func() {
				_, err = s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: badPod(dir)})
			})
			if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), c.says) {
				t.Errorf("RunPodSandbox = %v; want Unavailable that says %q", err, c.says)
			}
			if left := h.left(); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
			sb := s.run(t)
			ctr := s.create(t, sb, ctrConfig("c"))
			s.start(t, ctr)
			s.unharmed(t, sb, ctr)
		})
	}
}

// A guest that does it now and then loses sessions, not its pod.
func TestWrongsAreForgotten(t *testing.T) {
	var w wrongCount
	at := time.Unix(1000, 0)
	for i := range 20 {
		if w.add(at.Add(time.Duration(i) * wrongsWithin / 2)) {
			t.Fatalf("given up after %d wrongs, two a minute", i+1)
		}
	}
	at = at.Add(time.Hour)
	for i := range maxWrongs {
		if given := w.add(at.Add(time.Duration(i) * time.Second)); given != (i == maxWrongs-1) {
			t.Errorf("wrong %d of %d: given up %v", i+1, maxWrongs, given)
		}
	}
	if len(w) > maxWrongs {
		t.Errorf("%d times are remembered", len(w))
	}
}
