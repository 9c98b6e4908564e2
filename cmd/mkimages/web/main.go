// Web is the web server of Atoll's demo image atoll.local/web.
//
//	/            the host's name, the request's number and who asked
//	/healthz     ok, or 503 once the server was told to end
//	/env?name=X  the variable X; without name all that are no secret
//	/slow?for=2s answers after that time (at most a minute)
//	/count       how many requests there were
//
// With -grpc it also answers gRPC's health check (grpc.health.v1), which is
// small enough to be written by hand. SIGTERM lets requests under way end, for
// at most -grace.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"sort"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	listen := flag.String("listen", ":8080", "`address` to serve HTTP on")
	grpc := flag.String("grpc", "", "`address` to serve gRPC's health check on; empty: none")
	grace := flag.Duration("grace", 20*time.Second, "how long requests under way may take after SIGTERM")
	flag.Parse()
	log.SetFlags(log.LstdFlags | log.Lmicroseconds | log.LUTC)
	log.SetOutput(os.Stdout)
	if err := run(*listen, *grpc, *grace); err != nil {
		log.Fatal(err)
	}
}

func run(listen, grpc string, grace time.Duration) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	s := &site{started: time.Now()}
	servers := []*http.Server{{Addr: listen, Handler: s.routes(), ReadHeaderTimeout: 10 * time.Second}}
	if grpc != "" {
		var h2c http.Protocols
		h2c.SetUnencryptedHTTP2(true)
		servers = append(servers, &http.Server{Addr: grpc, Handler: http.HandlerFunc(s.grpcHealth), Protocols: &h2c, ReadHeaderTimeout: 10 * time.Second})
	}
	failed := make(chan error, len(servers))
	for _, srv := range servers {
		go func() { failed <- srv.ListenAndServe() }()
		log.Printf("listening on %s", srv.Addr)
	}
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	log.Printf("told to end: waiting up to %v for requests under way", grace)
	s.ending.Store(true)
	end, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	var err error
	for _, srv := range servers {
		err = errors.Join(err, srv.Shutdown(end))
	}
	log.Printf("served %d requests in %v", s.requests.Load(), time.Since(s.started).Round(time.Millisecond))
	return err
}

type site struct {
	started  time.Time
	requests atomic.Int64
	ending   atomic.Bool
}

func (s *site) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/", s.hello)
	mux.HandleFunc("/healthz", s.healthz)
	mux.HandleFunc("/env", env)
	mux.HandleFunc("/slow", slow)
	mux.HandleFunc("/count", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, s.requests.Load()) })
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		start := time.Now()
		s.requests.Add(1)
		mux.ServeHTTP(w, req)
		if req.URL.Path != "/healthz" { // probes would drown the rest
			log.Printf("%s %s from %s in %v", req.Method, req.URL.Path, req.RemoteAddr, time.Since(start).Round(time.Microsecond))
		}
	})
}

func (s *site) hello(w http.ResponseWriter, req *http.Request) {
	if req.URL.Path != "/" {
		http.NotFound(w, req)
		return
	}
	host, err := os.Hostname()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	fmt.Fprintf(w, "Hello from %s, request %d, to you at %s\n", host, s.requests.Load(), req.RemoteAddr)
}

func (s *site) healthz(w http.ResponseWriter, _ *http.Request) {
	if s.ending.Load() {
		http.Error(w, "ending", http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ok")
}

func env(w http.ResponseWriter, req *http.Request) {
	if name := req.URL.Query().Get("name"); name != "" {
		value, ok := os.LookupEnv(name)
		if !ok {
			http.Error(w, "not set", http.StatusNotFound)
			return
		}
		fmt.Fprintln(w, value)
		return
	}
	all := os.Environ()
	sort.Strings(all)
	for _, kv := range all {
		name, _, _ := strings.Cut(kv, "=")
		for _, word := range []string{"SECRET", "TOKEN", "PASSWORD", "KEY"} {
			if strings.Contains(strings.ToUpper(name), word) {
				kv = name + "=(not shown)"
			}
		}
		fmt.Fprintln(w, kv)
	}
}

func slow(w http.ResponseWriter, req *http.Request) {
	d, err := time.ParseDuration(req.URL.Query().Get("for"))
	if err != nil || d < 0 || d > time.Minute {
		http.Error(w, "want for=, a duration of at most 1m", http.StatusBadRequest)
		return
	}
	select {
	case <-time.After(d):
		fmt.Fprintln(w, "waited", d)
	case <-req.Context().Done():
	}
}

// grpcHealth answers grpc.health.v1.Health/Check with SERVING (1) or
// NOT_SERVING (2): a frame of five bytes and a message with field 1.
func (s *site) grpcHealth(w http.ResponseWriter, req *http.Request) {
	_, _ = io.Copy(io.Discard, io.LimitReader(req.Body, 1<<20))
	w.Header().Set("Content-Type", "application/grpc")
	w.Header().Set("Trailer", "Grpc-Status")
	if req.URL.Path != "/grpc.health.v1.Health/Check" {
		w.Header().Set("Grpc-Status", "12") // UNIMPLEMENTED
		return
	}
	status := byte(1)
	if s.ending.Load() {
		status = 2
	}
	_, _ = w.Write([]byte{0, 0, 0, 0, 2, 0x08, status})
	w.Header().Set("Grpc-Status", "0")
}
