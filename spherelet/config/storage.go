package config

import (
	"path/filepath"

	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// The datastore of a node whose configuration names none, and its policy.
const (
	DefaultDatastore = "local"
	DefaultPolicy    = v1alpha1.DefaultPolicy
)

func setDefaultDatastore(c *v1alpha1.SphereletConfiguration) {
	s := &c.Storage
	if s.Disabled || len(s.Datastores) > 0 || c.DataDir == "" {
		return
	}
	s.Datastores = []v1alpha1.Datastore{{
		Name: DefaultDatastore, Path: PathsOf(c).Volumes,
		Policies: []v1alpha1.DatastorePolicy{{Name: DefaultPolicy, Description: "disks of this host, thin, without limits"}},
	}}
}

// validateStorage looks at each value by itself; the back end judges what
// belongs together.
func validateStorage(c *v1alpha1.SphereletConfiguration) []error {
	var errs []error
	names := map[string]bool{}
	for _, d := range c.Storage.Datastores {
		where := "storage.datastores[" + d.Name + "]"
		if len(validation.IsDNS1123Label(d.Name)) > 0 || names[d.Name] {
			errs = append(errs, invalid("%s.name must be a DNS label that no other datastore has", where))
		}
		names[d.Name] = true
		if !filepath.IsAbs(d.Path) {
			errs = append(errs, invalid("%s.path is %q, must be an absolute path", where, d.Path))
		}
		if d.Format != "" && d.Format != "raw" && d.Format != "qcow2" {
			errs = append(errs, invalid("%s.format is %q, must be raw or qcow2", where, d.Format))
		}
		if len(d.Policies) == 0 {
			errs = append(errs, invalid("%s.policies is empty, must name the policies that volumes there keep", where))
		}
		for _, p := range d.Policies {
			errs = append(errs, validatePolicy(where+".policies["+p.Name+"]", p)...)
		}
	}
	return errs
}

func validatePolicy(where string, p v1alpha1.DatastorePolicy) []error {
	var errs []error
	if len(validation.IsDNS1123Label(p.Name)) > 0 {
		errs = append(errs, invalid("%s.name must be a DNS label", where))
	}
	if p.Encrypted != (p.KeyFile != "") || p.KeyFile != "" && !filepath.IsAbs(p.KeyFile) {
		errs = append(errs, invalid("%s.keyFile is %q, must be the absolute path of the key with encrypted, and left out without", where, p.KeyFile))
	}
	if p.IOPS < 0 {
		errs = append(errs, invalid("%s.iops is %d, must not be negative", where, p.IOPS))
	}
	if q, err := resource.ParseQuantity(p.Bandwidth); p.Bandwidth != "" && (err != nil || q.Sign() <= 0) {
		errs = append(errs, invalid("%s.bandwidth is %q, must be bytes a second, such as 100Mi", where, p.Bandwidth))
	}
	return errs
}
