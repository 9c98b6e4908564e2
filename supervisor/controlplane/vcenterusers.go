package controlplane

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// usersPath is on the socket that only root can open.
const usersPath = "/vcenter/users"

// A VCenterUser is one of the embedded vCenter's single sign-on.
type VCenterUser struct {
	Name   string   `json:"name"` // NAME@DOMAIN
	Groups []string `json:"groups"`
}

// VCenterUsers lists the users of the embedded vCenter of the running control
// plane, by name. One that does not run is ErrUnavailable, one without an
// embedded vCenter ErrNotFound.
func VCenterUsers(ctx context.Context, cfg Config) (users []VCenterUser, err error) {
	return users, askUsers(ctx, cfg, http.MethodGet, usersPath, nil, &users)
}

// SetVCenterUser makes a user, or changes its password, and makes it a member of
// the groups, which are made if they are not there; other memberships stay. A
// name that cannot be is ErrInvalidArgument, the supervisor's own account
// ErrPermissionDenied.
func SetVCenterUser(ctx context.Context, cfg Config, user VCenterUser, password string) error {
	return askUsers(ctx, cfg, http.MethodPut, usersPath, map[string]any{"name": user.Name, "groups": user.Groups, "password": password}, nil)
}

// RemoveVCenterUser takes a user away; an unknown one is ErrNotFound, the
// administrator and the supervisor's own account are ErrPermissionDenied.
func RemoveVCenterUser(ctx context.Context, cfg Config, name string) error {
	return askUsers(ctx, cfg, http.MethodDelete, usersPath+"/"+url.PathEscape(name), nil, nil)
}

func askUsers(ctx context.Context, cfg Config, method, path string, in, out any) error {
	var body bytes.Buffer
	if in != nil {
		if err := json.NewEncoder(&body).Encode(in); err != nil {
			return err
		}
	}
	client := http.Client{
		Timeout: 15 * checkTimeout, // hashing a password is slow on purpose
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", cfg.healthSocket())
		}},
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://supervisor"+path, &body)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("users of the embedded vCenter: no control plane answers on %s: %v: %w", cfg.healthSocket(), err, errdefs.ErrUnavailable)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 8<<20))
	switch {
	case err != nil:
		return fmt.Errorf("users of the embedded vCenter: %v: %w", err, errdefs.ErrUnavailable)
	case resp.StatusCode/100 == 2 && out == nil:
		return nil
	case resp.StatusCode/100 == 2:
		return json.Unmarshal(answer, out)
	}
	var class error = errdefs.ErrUnknown
	for _, c := range userErrors {
		if resp.StatusCode == c.status {
			class = c.class
		}
	}
	return fmt.Errorf("%s: %w", strings.TrimSpace(string(answer)), class)
}

// userErrors are the classes that cross the socket.
var userErrors = []struct {
	class  error
	status int
}{
	{errdefs.ErrInvalidArgument, http.StatusBadRequest},
	{errdefs.ErrPermissionDenied, http.StatusForbidden},
	{errdefs.ErrNotFound, http.StatusNotFound},
}

// serveUsers answers the three functions above.
func (h *healthServer) serveUsers(vcenter *vcsim.Server) {
	users := vcenter.Users()
	answer := func(w http.ResponseWriter, err error) {
		if err == nil {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		status, text := http.StatusInternalServerError, err.Error()
		for _, c := range userErrors {
			if cut, ok := strings.CutSuffix(text, ": "+c.class.Error()); ok {
				status, text = c.status, cut
			}
		}
		http.Error(w, text, status)
	}
	h.mux.HandleFunc("GET "+usersPath, func(w http.ResponseWriter, _ *http.Request) {
		list := []VCenterUser{}
		for _, u := range users.List() {
			list = append(list, VCenterUser{Name: u.Name, Groups: u.Groups})
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(list) // whoever asked is gone
	})
	h.mux.HandleFunc("PUT "+usersPath, func(w http.ResponseWriter, r *http.Request) {
		var u struct {
			VCenterUser
			Password string `json:"password"`
		}
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(&u); err != nil {
			answer(w, fmt.Errorf("no user: %w", errdefs.ErrInvalidArgument))
			return
		}
		answer(w, setUser(users, u.VCenterUser, u.Password))
	})
	h.mux.HandleFunc("DELETE "+usersPath+"/{name}", func(w http.ResponseWriter, r *http.Request) {
		name := r.PathValue("name")
		if isUser(name, vcsim.AdminName) || isUser(name, vcenterUser) {
			answer(w, fmt.Errorf("%s is needed here and cannot be removed: %w", name, errdefs.ErrPermissionDenied))
			return
		}
		answer(w, users.Remove(name))
	})
}

func setUser(users *vcsim.Users, u VCenterUser, password string) error {
	if isUser(u.Name, vcenterUser) {
		return fmt.Errorf("%s is the supervisor's own, which gets a new password at each start: %w", u.Name, errdefs.ErrPermissionDenied)
	}
	if err := users.Set(u.Name, password); err != nil {
		return err
	}
	for _, g := range u.Groups {
		if err := users.Join(g, u.Name); err != nil {
			return err
		}
	}
	return nil
}

// isUser compares as single sign-on does.
func isUser(name, want string) bool {
	name, _, _ = strings.Cut(name, "@")
	if _, local, ok := strings.Cut(name, `\`); ok {
		name = local
	}
	return strings.EqualFold(name, want)
}
