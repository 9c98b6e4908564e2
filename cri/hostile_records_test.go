package cri

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// A liar speaks the protocol well, and lies in it.
type liar struct {
	*fakeGuest
	victim  atomic.Value // a container of another pod
	mine    atomic.Value // its own
	logs    func(h *agentapi.StreamHeader, s *agentapi.Stream) error
	exits   func(l *liar, s *agentapi.Stream) error
	stats   *agentapi.StatsResponse
	hello   *agentapi.HelloResponse
	acks    atomic.Int64
	release chan struct{}
}

func (l *liar) Stats(ctx context.Context, r *agentapi.StatsRequest) (*agentapi.StatsResponse, error) {
	if l.stats != nil {
		return l.stats, nil
	}
	return l.fakeGuest.Stats(ctx, r)
}

func (l *liar) Hello(ctx context.Context, r *agentapi.HelloRequest) (*agentapi.HelloResponse, error) {
	if l.hello != nil {
		return l.hello, nil
	}
	return l.fakeGuest.Hello(ctx, r)
}

func (l *liar) Acknowledge(context.Context, *agentapi.AcknowledgeRequest) (*agentapi.AcknowledgeResponse, error) {
	l.acks.Add(1)
	return &agentapi.AcknowledgeResponse{}, nil // and forgets nothing
}

func (l *liar) ServeStream(ctx context.Context, h *agentapi.StreamHeader, s *agentapi.Stream) error {
	switch {
	case h.Kind == agentapi.StreamHeader_EXITS && l.exits != nil:
		if err := s.Accept(); err != nil {
			return err
		}
		select {
		case <-l.release:
		case <-ctx.Done():
			return nil
		}
		return l.exits(l, s)
	case h.Kind == agentapi.StreamHeader_LOGS && l.logs != nil:
		if err := s.Accept(); err != nil {
			return err
		}
		return l.logs(h, s)
	}
	return l.fakeGuest.ServeStream(ctx, h, s)
}

// serveLiar starts a server whose bad pod's guest is l.
func serveLiar(t *testing.T, l *liar) (*testServer, *fakeHost) {
	h := newFakeHost()
	l.release = make(chan struct{})
	s := serve(t, h, t.TempDir(), func(c *Config) {
		c.Driver = hostileDriver{fakeDriver{h}, func(conn net.Conn, m *fakeMachine) {
			l.fakeGuest = m.guest
			agentapi.Serve(context.Background(), conn, l, func(string, ...any) {})
		}}
	})
	return s, h
}

func sendExits(s *agentapi.Stream, recs ...*agentapi.ExitRecord) error {
	for _, r := range recs {
		if err := s.Send(r); err != nil {
			return err
		}
	}
	return s.Flush()
}

// Exits of other pods' containers, of none, again and again, in any order, at
// any time: the neighbour's runs on, its own ends once, now.
func TestLiesAboutExits(t *testing.T) {
	l := &liar{exits: func(l *liar, s *agentapi.Stream) error {
		victim, mine := l.victim.Load().(string), l.mine.Load().(string)
		long := strings.Repeat("x", 20000)
		for i := range uint64(5000) {
			err := sendExits(s,
				&agentapi.ExitRecord{Offset: i, ContainerId: victim, ExitCode: 0, Reason: "Completed"},
				&agentapi.ExitRecord{Offset: math.MaxUint64 - i, ContainerId: fmt.Sprint("none-", i)},
				&agentapi.ExitRecord{Offset: 7, ContainerId: victim, ExecId: fmt.Sprint(i)})
			if err != nil {
				return err
			}
		}
		for range 100 { // replayed
			err := sendExits(s, &agentapi.ExitRecord{Offset: 1, ContainerId: mine, ExitCode: 3, Reason: "No reason\nat all", Message: long, TimeNs: math.MaxInt64})
			if err != nil {
				return err
			}
		}
		<-s.Gone()
		return nil
	}}
	s, _ := serveLiar(t, l)
	good, bad, goodCtr, badCtr := s.neighbours(t)
	l.victim.Store(goodCtr)
	l.mine.Store(badCtr)
	heapWithin(t, 64<<20, func() {
		close(l.release)
		eventually(t, "its own container ends", func() bool {
			return s.status(t, badCtr).State == runtimeapi.ContainerState_CONTAINER_EXITED
		})
	})
	c := s.status(t, badCtr)
	if c.FinishedAt > time.Now().UnixNano() || c.FinishedAt < c.StartedAt || c.ExitCode != 3 || c.Reason != "Error" || len(c.Message) > 5000 {
		t.Errorf("its end: %v after %v, code %d, reason %q, %d bytes of message", time.Unix(0, c.FinishedAt), time.Unix(0, c.StartedAt), c.ExitCode, c.Reason, len(c.Message))
	}
	s.unharmed(t, good, goodCtr)
	if sb, _ := s.store.sandbox(bad); sb.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Errorf("lies cost it its sandbox: %s", sb.Message)
	}
	s.remove(t, bad)
}

// Log records that come again, jump and never end a line: each is written
// once, no more than was sent, and nothing is held.
func TestLiesInLogs(t *testing.T) {
	const records, size = 4000, 16 << 10
	line := bytes.Repeat([]byte("endless "), size/8)
	sent := make(chan struct{})
	l := &liar{logs: func(_ *agentapi.StreamHeader, s *agentapi.Stream) error {
		for i := range uint64(records) {
			rec := &agentapi.LogRecord{Offset: i + 1, Line: line, Partial: true, TimeNs: math.MinInt64}
			if i%2 == 1 {
				rec.TimeNs = math.MaxInt64
			}
			for _, r := range []*agentapi.LogRecord{rec, {Offset: 1, Line: line}, {Offset: i / 2, Line: line}} { // two of three are old
				if r.Offset == 0 {
					continue // that would end the stream
				}
				if err := s.Send(r); err != nil {
					return err
				}
			}
		}
		if err := s.Flush(); err != nil {
			return err
		}
		close(sent)
		<-s.Gone()
		return nil
	}}
	s, _ := serveLiar(t, l)
	var good, goodCtr, badCtr string
	heapWithin(t, 64<<20, func() {
		good, _, goodCtr, badCtr = s.neighbours(t)
		<-sent
	})
	path := s.status(t, badCtr).LogPath
	want := int64(records) * int64(size)
	eventually(t, "the log is written", func() bool {
		fi, err := os.Stat(path)
		return err == nil && fi.Size() > want
	})
	fi, err := os.Stat(path)
	if err != nil || fi.Size() > want+records*64 {
		t.Errorf("the log has %d bytes, %d were sent once: %v", fi.Size(), want, err)
	}
	f, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for i, head := range bytes.SplitN(f, []byte{'\n'}, 4)[:3] {
		at, _, _ := bytes.Cut(head, []byte{' '})
		if _, err := time.Parse(time.RFC3339Nano, string(at)); err != nil {
			t.Errorf("line %d: %v", i, err)
		}
	}
	s.unharmed(t, good, goodCtr)
}

// Numbers and names as large as a message takes do not fill the lists, which
// are one message for all pods.
func TestLiesInStats(t *testing.T) {
	stats := &agentapi.StatsResponse{MemoryTotal: math.MaxUint64, Guest: &agentapi.ContainerStats{CpuUsageNs: math.MaxUint64, MemoryWorkingSet: math.MaxUint64}}
	for i := range 60_000 {
		stats.Networks = append(stats.Networks, &agentapi.NetworkStats{Name: fmt.Sprintf("eth%040d", i), RxBytes: math.MaxUint64})
	}
	if n := proto.Size(stats); n > 4<<20 {
		t.Fatalf("%d bytes would not fit into a message", n)
	}
	features := make([]string, 50_000)
	for i := range features {
		features[i] = fmt.Sprintf("feature-%d", i)
	}
	l := &liar{stats: stats, hello: &agentapi.HelloResponse{Protocol: agentapi.Protocol, Version: strings.Repeat("v", 1<<20), Features: append(features, "seccomp")}}
	s, _ := serveLiar(t, l)
	good, bad, goodCtr, _ := s.neighbours(t)
	r, err := s.rt.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{})
	if err != nil || len(r.Stats) != 2 || proto.Size(r) > 64<<10 {
		t.Errorf("stats of %d pods in %d bytes, %v", len(r.GetStats()), proto.Size(r), err)
	}
	if sb, _ := s.store.sandbox(bad); len(sb.Features) > maxGuestFeatures {
		t.Errorf("%d features are kept", len(sb.Features))
	}
	st, err := s.rt.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: bad, Verbose: true})
	if err != nil || proto.Size(st) > 64<<10 {
		t.Errorf("a status of %d bytes, %v", proto.Size(st), err)
	}
	s.unharmed(t, good, goodCtr)
}
