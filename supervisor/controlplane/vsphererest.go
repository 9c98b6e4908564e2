package controlplane

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/supervisor/namespaces/rest"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// A restVCenter is the embedded vCenter, as vSphere's REST of namespaces asks
// it.
type restVCenter struct{ server *vcsim.Server }

func (v restVCenter) Caller(r *http.Request) (string, error) {
	who, ok := v.server.Caller(r)
	if !ok {
		return "", fmt.Errorf("no session: %w", errdefs.ErrUnauthenticated)
	}
	return who.Name, nil
}

func (v restVCenter) Allowed(_ context.Context, user, privilege string, entities []rest.Entity) ([]bool, error) {
	who, err := v.server.Users().Lookup(user)
	if err != nil {
		return nil, fmt.Errorf("user %s has been deleted: %w", user, errdefs.ErrUnauthenticated)
	}
	allowed := make([]bool, len(entities))
	for i, e := range entities {
		if e != rest.Root && !v.server.Exists(e.Kind, e.ID) {
			return nil, fmt.Errorf("vCenter has no %s: %w", e, errdefs.ErrNotFound)
		}
		allowed[i] = v.server.Allowed(who, privilege, e.Kind, e.ID)
	}
	return allowed, nil
}

// restOptions are those of vSphere's REST of namespaces but for its VCenter.
func (c Config) restOptions() (rest.Options, error) {
	cfg, err := restConfig(c, vsphereREST)
	if err != nil {
		return rest.Options{}, err
	}
	client, err := rest.NewClient(cfg)
	if err != nil {
		return rest.Options{}, err
	}
	ca, err := os.ReadFile(c.ClientCAFile())
	if err != nil {
		return rest.Options{}, err
	}
	return rest.Options{Client: client, Cluster: rest.Cluster{
		Endpoint: strings.TrimPrefix(c.Server(), "https://"), Version: KubernetesVersion, CA: ca, Services: c.ServiceCIDR.String(),
	}}, nil
}

// serveNamespaces has the embedded vCenter serve vSphere's REST of namespaces.
// Calls fail until the add-ons have given it its rights.
func (c Config) serveNamespaces(vcenter *vcsim.Server) error {
	o, err := c.restOptions()
	if err != nil {
		return err
	}
	o.VCenter = restVCenter{vcenter}
	handler := rest.New(o)
	for _, pattern := range rest.Patterns() {
		vcenter.HandleFunc(pattern, handler.ServeHTTP)
	}
	return nil
}
