package spherelet

import (
	"context"
	"flag"
	"log/slog"
	"strconv"

	"k8s.io/klog/v2"
)

// setupLogging sends upstream's messages through ours. Verbosity is klog's:
// its V(n) becomes slog's level -n, so the handler must let those through.
func setupLogging(log *slog.Logger, verbosity int32) {
	fs := flag.NewFlagSet("klog", flag.ContinueOnError)
	klog.InitFlags(fs)
	_ = fs.Set("v", strconv.Itoa(int(verbosity)))
	klog.SetSlogLogger(slog.New(&verboseHandler{Handler: log.Handler(), least: slog.Level(-verbosity)}).With("component", "kubelet"))
}

// Handle says "debug" for everything that klog says verbosely.
func (h *verboseHandler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level < slog.LevelInfo {
		r.Level = slog.LevelDebug
	}
	return h.Handler.Handle(ctx, r)
}

// verboseHandler lets through what upstream says up to the configured
// verbosity, which counts as information; warnings and errors as ours.
type verboseHandler struct {
	slog.Handler
	least slog.Level
}

func (h *verboseHandler) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= h.least && h.Handler.Enabled(ctx, max(l, slog.LevelInfo))
}

func (h *verboseHandler) WithAttrs(as []slog.Attr) slog.Handler {
	return &verboseHandler{Handler: h.Handler.WithAttrs(as), least: h.least}
}

func (h *verboseHandler) WithGroup(name string) slog.Handler {
	return &verboseHandler{Handler: h.Handler.WithGroup(name), least: h.least}
}
