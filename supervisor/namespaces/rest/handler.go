package rest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// maxBody is far more than the largest specification.
const maxBody = 1 << 20

// fieldOwner is who the API server notes as the author of changes.
const fieldOwner = client.FieldOwner("atoll-vsphere-rest")

// Options of a Handler; all but Logger and Cluster are needed.
type Options struct {
	// Client reads and writes the objects. It must not read from a cache: who
	// has made a namespace expects to find it.
	Client  client.Client
	VCenter VCenter
	Cluster Cluster
	Logger  *slog.Logger // nil: slog.Default()
}

// A Cluster is what the calls about clusters tell of Kubernetes.
type Cluster struct {
	Endpoint string // of the API server, "host:port"; what people's kubectl uses
	Version  string // of Kubernetes, "v1.36.3"
	CA       []byte // PEM that the endpoint's certificate is signed by
	Services string // CIDR of service addresses
}

// A Handler serves the calls of Routes. It keeps no state: every answer is read
// from the API server and from vCenter.
type Handler struct {
	client  client.Client
	vcenter VCenter
	cluster Cluster
	log     *slog.Logger
	mux     *http.ServeMux
}

// New makes no call.
func New(o Options) *Handler {
	h := &Handler{client: o.Client, vcenter: o.VCenter, cluster: o.Cluster, log: o.Logger, mux: http.NewServeMux()}
	if h.log == nil {
		h.log = slog.Default()
	}
	for _, route := range routes {
		h.mux.Handle(route.Method+" "+route.Path, h.serve(route))
	}
	h.mux.HandleFunc("/", noRoute)
	return h
}

// Patterns are those of net/http under which a vCenter mounts a Handler among
// its own paths. Sessions are the vCenter's.
func Patterns() []string {
	return []string{
		"/api/vcenter/namespaces/",
		"/api/vcenter/namespace-management/",
		"/api/vcenter/namespaces-user/",
		"/api/vcenter/storage/policies",
		"/api/vcenter/storage/policies/",
	}
}

// ServeHTTP answers every call, with an error in vSphere's shape where it has no
// other answer.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	h.mux.ServeHTTP(w, r)
}

func noRoute(w http.ResponseWriter, r *http.Request) {
	writeFault(w, problemf(errOperationNotFound, "There is no operation %s %s.", r.Method, r.URL.Path))
}

// A call is one request and who makes it.
type call struct {
	*http.Request
	user string
}

func (h *Handler) serve(route Route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := &call{Request: r}
		result, err := h.answer(route, c)
		log := h.log.With("user", c.user, "method", r.Method, "path", r.URL.Path)
		if err != nil {
			if f := faultOf(err); f.status >= http.StatusInternalServerError {
				log.WarnContext(r.Context(), "vSphere REST call failed", "err", err)
			} else {
				log.DebugContext(r.Context(), "vSphere REST call refused", "fault", f.kind, "err", err)
			}
			writeFault(w, err)
			return
		}
		if r.Method != http.MethodGet {
			log.InfoContext(r.Context(), "vSphere REST call done")
		}
		if result == nil {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		writeJSON(w, http.StatusOK, result)
	})
}

func (h *Handler) answer(route Route, c *call) (any, error) {
	var err error
	if c.user, err = h.vcenter.Caller(c.Request); errdefs.IsUnauthorized(err) {
		return nil, errNoSession
	} else if err != nil {
		return nil, err
	}
	if action := c.URL.Query().Get("action"); action != "" && !slices.Contains(route.actions, action) {
		return nil, problemf(errOperationNotFound, "There is no operation %s %s?action=%s.", c.Method, c.URL.Path, action)
	}
	if route.Unsupported != "" {
		return nil, problemf(errdefs.ErrNotImplemented, "%s", route.Unsupported)
	}
	return route.do(h, c)
}

// decode reads a body strictly: a field that is not in v is not ignored.
func (c *call) decode(v any) error {
	d := json.NewDecoder(c.Body)
	d.DisallowUnknownFields()
	err := d.Decode(v)
	if err == nil {
		if _, err := d.Token(); !errors.Is(err, io.EOF) {
			return problemf(errUnexpectedInput, "The body has more than one JSON value.")
		}
		return nil
	}
	var p *problem
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &p):
		return p
	case errors.As(err, &tooLarge):
		return problemf(errdefs.ErrInvalidArgument, "The body is larger than %d bytes.", tooLarge.Limit)
	case errors.Is(err, io.EOF):
		return problemf(errUnexpectedInput, "The body is missing: it is the specification in JSON.")
	}
	return problemf(errUnexpectedInput, "The body is not what this call takes: %s.", strings.TrimPrefix(err.Error(), "json: "))
}

// supervisor is the cluster's one; ErrNotFound before there is one.
func (h *Handler) supervisor(ctx context.Context) (*v1alpha1.Supervisor, error) {
	sv := &v1alpha1.Supervisor{}
	err := h.client.Get(ctx, client.ObjectKey{Name: v1alpha1.SupervisorName}, sv)
	if apierrors.IsNotFound(err) {
		return nil, errNoSupervisor
	}
	return sv, kubernetesError(err)
}

var errNoSupervisor = problemf(errdefs.ErrNotFound, "This cluster has no Supervisor: make one with kubectl, it names the vCenter and its clusters.")

// zonesOf are the zones named, or all, as they were found in vCenter.
func zonesOf(sv *v1alpha1.Supervisor, names []string) []v1alpha1.ZoneStatus {
	if len(names) == 0 {
		return sv.Status.Zones
	}
	var list []v1alpha1.ZoneStatus
	for _, z := range sv.Status.Zones {
		if slices.Contains(names, z.Name) {
			list = append(list, z)
		}
	}
	return list
}

// environment reads what conversions of a namespace in these zones need.
func (h *Handler) environment(ctx context.Context, sv *v1alpha1.Supervisor, zones []string) (environment, error) {
	list := &v1alpha1.StoragePolicyList{}
	if err := h.client.List(ctx, list); err != nil {
		return environment{}, kubernetesError(err)
	}
	return environment{clock: clockOf(sv.Status.Zones, zones), ssoDomain: sv.Spec.SSODomain, policies: list.Items}, nil
}

func (h *Handler) classNames(ctx context.Context) (map[string]bool, error) {
	list := &v1alpha1.VirtualMachineClassList{}
	if err := h.client.List(ctx, list); err != nil {
		return nil, kubernetesError(err)
	}
	names := map[string]bool{}
	for _, c := range list.Items {
		names[c.Name] = true
	}
	return names, nil
}

// conflictTries is how often a change is made anew on what somebody else, most
// often a controller, has written meanwhile.
const conflictTries = 8

// retryConflict calls try until it is not ErrConflict. try must read anew.
func retryConflict(ctx context.Context, what string, try func() error) error {
	var err error
	for range conflictTries {
		if err = try(); !errdefs.IsConflict(err) {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return problemf(errdefs.ErrConflict, "%s was changed by others each of the %d times that this change was made: try again.", what, conflictTries)
}

// equalJSON tells whether two values would be the same object for the API
// server.
func equalJSON(a, b any) bool {
	x, err := json.Marshal(a)
	if err != nil {
		return false
	}
	y, err := json.Marshal(b)
	return err == nil && bytes.Equal(x, y)
}
