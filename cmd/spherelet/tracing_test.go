package main

import (
	"context"
	"net"
	"testing"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// spanSink is a collector that hands on what it gets.
type spanSink struct {
	collector.UnimplementedTraceServiceServer
	got chan *collector.ExportTraceServiceRequest
}

func (s spanSink) Export(_ context.Context, r *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	s.got <- r
	return &collector.ExportTraceServiceResponse{}, nil
}

func TestSpansReachTheCollector(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	sink := spanSink{got: make(chan *collector.ExportTraceServiceRequest, 1)}
	srv := grpc.NewServer()
	collector.RegisterTraceServiceServer(srv, sink)
	go func() { _ = srv.Serve(l) }()
	defer srv.Stop()
	h := &host{cfg: &v1alpha1.SphereletConfiguration{NodeName: "n1"}}
	if opts, err := h.openTracing(t.Context()); err != nil || opts != nil || h.tracing != nil {
		t.Fatalf("without a setting: %v, %v, %v", opts, h.tracing, err)
	}
	h.closeTracing()
	h.cfg.Tracing = &v1alpha1.TracingConfiguration{Endpoint: l.Addr().String(), SamplingRatePerMillion: 1e6}
	opts, err := h.openTracing(t.Context())
	if err != nil || len(opts) != 1 {
		t.Fatal(opts, err)
	}
	_, span := h.tracing.Tracer("test").Start(t.Context(), "a span")
	span.End()
	h.closeTracing() // sends what is left
	select {
	case r := <-sink.got:
		attributes := map[string]string{}
		for _, a := range r.ResourceSpans[0].Resource.Attributes {
			attributes[a.Key] = a.Value.GetStringValue()
		}
		name := r.ResourceSpans[0].ScopeSpans[0].Spans[0].Name
		if name != "a span" || attributes["service.name"] != "atoll-cri" || attributes["host.name"] != "n1" {
			t.Errorf("got %q of %v", name, attributes)
		}
	default:
		t.Error("the last spans were not sent")
	}
}
