package client

import (
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/supervisor/login/loginapi"
)

// A target is a supervisor's login server.
type target struct {
	host string // name or address, without brackets
	port int
}

// parseTarget reads what --server gets: HOST, HOST:PORT or https:// and either.
func parseTarget(s string) (target, error) {
	bad := func(why string) (target, error) {
		return target{}, fmt.Errorf("--server %q: %s: %w", s, why, errdefs.ErrInvalidArgument)
	}
	rest := s
	if scheme, after, ok := strings.Cut(s, "://"); ok {
		if scheme != "https" {
			return bad("only https carries a password")
		}
		rest = strings.TrimSuffix(after, "/")
	}
	if rest == "" || strings.ContainsAny(rest, "/?#@ \t\n") {
		return bad("want HOST or HOST:PORT")
	}
	t := target{host: strings.Trim(rest, "[]"), port: loginapi.DefaultPort}
	if net.ParseIP(t.host) != nil { // an IPv6 address has colons and no port
		return t, nil
	}
	if host, port, err := net.SplitHostPort(rest); err == nil {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 || host == "" {
			return bad("want a port of 1 to 65535")
		}
		t.host, t.port = host, int(n)
	}
	if u, err := url.Parse(t.url("")); err != nil || u.Hostname() != t.host {
		return bad("want HOST or HOST:PORT")
	}
	return t, nil
}

func (t target) url(path string) string {
	return "https://" + net.JoinHostPort(t.host, strconv.Itoa(t.port)) + path
}

// name is what people call it, as the context of the supervisor is called.
func (t target) name() string {
	if t.port == loginapi.DefaultPort {
		return t.host
	}
	return net.JoinHostPort(t.host, strconv.Itoa(t.port))
}

// cluster and user are entries in a kubeconfig.
func (t target) cluster() string         { return "atoll:" + t.name() }
func (t target) user(user string) string { return "atoll:" + t.name() + ":" + user }
