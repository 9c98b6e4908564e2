package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/resource"
	"google.golang.org/grpc"
	"k8s.io/component-base/tracing"

	"github.com/openatoll/atoll/internal/version"
	"github.com/openatoll/atoll/spherelet"
)

// lastSpans bounds how long spans that are still to be sent hold up an end.
const lastSpans = 2 * time.Second

// openTracing has the CRI take part in its clients' traces, if traces are to be
// sent somewhere.
func (h *host) openTracing(ctx context.Context) ([]grpc.ServerOption, error) {
	config := spherelet.Tracing(h.cfg)
	if config == nil {
		return nil, nil
	}
	provider, err := tracing.NewProvider(ctx, config, nil, []resource.Option{resource.WithAttributes(
		attribute.String("service.name", "atoll-cri"), attribute.String("service.version", version.Version), attribute.String("host.name", h.cfg.NodeName),
	)})
	if err != nil {
		return nil, fmt.Errorf("tracing: %w", err)
	}
	h.tracing = provider
	handler := otelgrpc.NewServerHandler(otelgrpc.WithTracerProvider(provider), otelgrpc.WithPropagators(tracing.Propagators()))
	return []grpc.ServerOption{grpc.StatsHandler(handler)}, nil
}

func (h *host) closeTracing() {
	if h.tracing == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), lastSpans)
	defer cancel()
	if err := h.tracing.Shutdown(ctx); err != nil {
		slog.Warn("the last spans could not be sent", "err", err)
	}
}
