//go:build failpoints

package main

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/openatoll/atoll/internal/version"
	"github.com/openatoll/atoll/storage/csi"
	"github.com/openatoll/atoll/vmpod"
)

// serveHints lets a test be the kubelet that this process has not got: it
// posts hints to RUNDIR/hints.sock, and takes them back; and the CSI driver
// answers.
func serveHints(ctx context.Context, h *host) error {
	if err := h.listenVolumes(ctx); err != nil {
		return err
	}
	var p vmpod.Preparer = h.runtime
	path := filepath.Join(h.cfg.RunDir, "hints.sock")
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	answer := func(w http.ResponseWriter, err error) {
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /prepare", func(w http.ResponseWriter, r *http.Request) {
		var hint vmpod.Hint
		err := json.NewDecoder(r.Body).Decode(&hint)
		if err == nil {
			err = p.Prepare(r.Context(), hint)
		}
		answer(w, err)
	})
	mux.HandleFunc("POST /forget", func(w http.ResponseWriter, r *http.Request) {
		answer(w, p.Forget(r.Context(), r.URL.Query().Get("uid")))
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	context.AfterFunc(ctx, func() { _ = srv.Close() })
	go func() { _ = srv.Serve(l) }()
	return nil
}

// listenVolumes serves the CSI driver, whose socket is there when this returns.
func (h *host) listenVolumes(ctx context.Context) error {
	driver, err := csi.New(csi.Config{Disks: h.volumes, NodeName: h.cfg.NodeName, Guest: h.runtime, Version: version.Version})
	if err != nil {
		return err
	}
	l, err := csi.Listen(h.paths.CSISocket)
	if err != nil {
		return err
	}
	go func() { _ = driver.Serve(ctx, l) }()
	return nil
}
