package cri

import (
	"slices"
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	otelpropagation "go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
)

func TestStartIsTold(t *testing.T) {
	for name, prepared := range map[string]bool{"prepared": true, "from CRI alone": false} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, newFakeHost(), t.TempDir())
			told := make(chan vmpod.Start, 4)
			s.Starts(func(st vmpod.Start) { told <- st })
			queued := time.Now().Add(-3 * time.Second)
			if prepared {
				if err := s.Prepare(t.Context(), vmpod.Hint{Owner: vmpod.Owner{PodUID: podUID, Namespace: "default", Name: "web"}, CPUs: 1, Memory: 1 << 28, EphemeralBytes: 1 << 30, Queued: queued}); err != nil {
					t.Fatal(err)
				}
			}
			sandbox := s.run(t)
			if _, err := s.img.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "atoll.local/web:1"}, SandboxConfig: podConfig(s.dir)}); err != nil {
				t.Fatal(err)
			}
			first, second := s.create(t, sandbox, ctrConfig("a")), s.create(t, sandbox, ctrConfig("b"))
			s.start(t, first)
			s.start(t, second)
			got := <-told
			if got.PodUID != podUID || got.Namespace != "default" || got.Name != "web" || got.Prepared != prepared {
				t.Errorf("told of %+v", got)
			}
			for _, phase := range vmpod.Phases() {
				has := slices.ContainsFunc(got.Phases, func(p vmpod.Phase) bool { return p.Name == phase })
				if want := prepared || phase != vmpod.PhaseQueue; has != want {
					t.Errorf("phase %s told: %v, want %v", phase, has, want)
				}
				if total := got.Total(phase); total < 0 || total > got.Took {
					t.Errorf("phase %s took %s of %s", phase, total, got.Took)
				}
			}
			if prepared && (!got.Begun.Equal(queued) || got.Total(vmpod.PhaseQueue) < 3*time.Second) {
				t.Errorf("begun %s after %s in the queue, was queued %s", got.Begun, got.Total(vmpod.PhaseQueue), queued)
			}
			select {
			case again := <-told:
				t.Errorf("told again: %+v", again)
			default:
			}
		})
	}
}

func TestStartOf(t *testing.T) {
	at := func(ms int) time.Time { return time.Unix(1000, int64(ms)*1e6) }
	const ms = time.Millisecond
	steps := []startStep{{vmpod.PhaseVM, "launch", at(10), at(30)}, {vmpod.PhaseAgent, "agent", at(30), at(90)}}
	for name, tc := range map[string]struct {
		queued time.Time
		want   vmpod.Start
	}{
		"queued":         {at(-20), vmpod.Start{Begun: at(-20), Took: 120 * ms, Phases: []vmpod.Phase{{Name: vmpod.PhaseQueue, Took: 20 * ms}, {Name: vmpod.PhaseVM, From: 30 * ms, Took: 20 * ms}, {Name: vmpod.PhaseAgent, From: 50 * ms, Took: 60 * ms}}}},
		"unknown":        {time.Time{}, vmpod.Start{Begun: at(0), Took: 100 * ms, Phases: []vmpod.Phase{{Name: vmpod.PhaseVM, From: 10 * ms, Took: 20 * ms}, {Name: vmpod.PhaseAgent, From: 30 * ms, Took: 60 * ms}}}},
		"of a bad clock": {at(50), vmpod.Start{Begun: at(0), Took: 100 * ms, Phases: []vmpod.Phase{{Name: vmpod.PhaseVM, From: 10 * ms, Took: 20 * ms}, {Name: vmpod.PhaseAgent, From: 30 * ms, Took: 60 * ms}}}},
	} {
		got := startOf(at(0), tc.queued, at(100), steps)
		if !got.Begun.Equal(tc.want.Begun) || got.Took != tc.want.Took || !slices.Equal(got.Phases, tc.want.Phases) {
			t.Errorf("%s: %+v, want %+v", name, got, tc.want)
		}
	}
}

func TestStartThatFailsOnIsBounded(t *testing.T) {
	c := newStartClock()
	c.step(vmpod.PhaseAgent, "agent")()
	for range 10 * maxSteps {
		c.step(vmpod.PhaseContainer, "create")()
	}
	if len(c.steps) != maxSteps || c.steps[0].phase != vmpod.PhaseAgent {
		t.Errorf("%d steps, the first %+v", len(c.steps), c.steps[0])
	}
	var adopted *startClock
	adopted.step(vmpod.PhaseAgent, "agent")()
	if _, first := adopted.finish(time.Time{}, time.Now()); first {
		t.Error("a start was told that this server has not seen")
	}
}

func TestSpansOfAStart(t *testing.T) {
	spans := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans), sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.NeverSample())))
	handler := otelgrpc.NewServerHandler(otelgrpc.WithTracerProvider(provider), otelgrpc.WithPropagators(otelpropagation.TraceContext{}))
	s := serve(t, newFakeHost(), t.TempDir(), func(c *Config) { c.ServerOptions = []grpc.ServerOption{grpc.StatsHandler(handler)} })
	const id = "4bf92f3577b34da6a3ce929d0e0e4736"
	ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-"+id+"-00f067aa0ba902b7-01")
	run, err := s.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: podConfig(s.dir)})
	if err != nil {
		t.Fatal(err)
	}
	created, err := s.rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: run.PodSandboxId, Config: ctrConfig("a"), SandboxConfig: podConfig(s.dir)})
	if err != nil {
		t.Fatal(err)
	}
	s.start(t, created.ContainerId) // of no trace
	s.stop()
	names, parents := map[string]string{}, map[string]string{}
	for _, span := range spans.Ended() {
		if span.SpanContext().TraceID().String() != id {
			t.Errorf("span %s is of trace %s", span.Name(), span.SpanContext().TraceID())
		}
		_, short, _ := strings.Cut(span.Name(), "/")
		if short == "" {
			short = span.Name()
		}
		names[span.SpanContext().SpanID().String()] = short
		parents[short] = span.Parent().SpanID().String()
	}
	for name, parent := range map[string]string{
		"network": "RunPodSandbox", "disk": "RunPodSandbox", "image disks": "RunPodSandbox", "launch": "RunPodSandbox", "agent": "RunPodSandbox", "setup": "RunPodSandbox",
		"agent Hello": "RunPodSandbox", "agent SetupSandbox": "RunPodSandbox", "agent CreateContainer": "CreateContainer",
	} {
		if got := names[parents[name]]; got != parent {
			t.Errorf("span %s is below %q, want %q", name, got, parent)
		}
	}
	if _, ok := parents["agent StartProcess"]; ok {
		t.Error("a call of no trace made a span")
	}
}
