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

	"github.com/openatoll/atoll/vmpod"
)

// serveHints lets a test be the kubelet that this process has not got: it
// posts hints to RUNDIR/hints.sock, and takes them back.
func serveHints(ctx context.Context, runDir string, p vmpod.Preparer) error {
	path := filepath.Join(runDir, "hints.sock")
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
