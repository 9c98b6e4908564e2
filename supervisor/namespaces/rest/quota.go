package rest

import (
	"bytes"
	"encoding/json"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// A quota is vSphere's resource_spec: ResourceQuotaOptionsV1 where a namespace
// is made, set or shown, ResourceQuotaOptionsV1Update where it is changed. What
// is not in the map is not limited, or not changed.
type quota map[string]quotaValue

// A quotaValue is a figure, or, of a change, that there shall be none.
type quotaValue struct {
	n     int64
	unset bool
}

// unsetSuffix makes the name of a figure that of the flag which takes it away.
const unsetSuffix = "_unset"

// storageRequestLimit is of all policies together, which Atoll does not have.
const storageRequestLimit = "storage_request_limit"

// UnmarshalJSON takes both types. Names that vSphere does not have are
// unexpected input.
func (q *quota) UnmarshalJSON(b []byte) error {
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(b, &raw); err != nil {
		return err
	}
	*q = quota{}
	for _, key := range slices.Sorted(maps.Keys(raw)) {
		value := bytes.TrimSpace(raw[key])
		if bytes.Equal(value, []byte("null")) || strings.HasPrefix(key, "@") {
			continue // "@class" says which of the types it is
		}
		name, isFlag := strings.CutSuffix(key, unsetSuffix)
		if !slices.Contains(quotaNames, name) {
			return problemf(errUnexpectedInput, "resource_spec has no field %q: there are %s.", key, strings.Join(quotaNames, ", "))
		}
		if isFlag {
			var flag bool
			if err := json.Unmarshal(value, &flag); err != nil {
				return problemf(errUnexpectedInput, "resource_spec.%s is true or false, not %s.", key, value)
			}
			if !flag {
				continue
			}
			if _, both := (*q)[name]; both {
				return problemf(errdefs.ErrInvalidArgument, "resource_spec has both %s and %s: give one.", name, key)
			}
			(*q)[name] = quotaValue{unset: true}
			continue
		}
		var n int64
		if err := json.Unmarshal(value, &n); err != nil {
			return problemf(errUnexpectedInput, "resource_spec.%s is a whole number, not %s.", key, value)
		}
		if n < 0 {
			return problemf(errdefs.ErrInvalidArgument, "resource_spec.%s is %d: a limit is not negative, leave it out for none.", key, n)
		}
		(*q)[name] = quotaValue{n: n}
	}
	return nil
}

// MarshalJSON writes ResourceQuotaOptionsV1.
func (q quota) MarshalJSON() ([]byte, error) {
	out := make(map[string]int64, len(q))
	for name, v := range q {
		if !v.unset {
			out[name] = v.n
		}
	}
	return json.Marshal(out)
}

// A quotaField ties a figure of vSphere's to the settings of a namespace. One of
// quantity and count is set. With make they return a place that can be written.
type quotaField struct {
	name     string
	cpu      bool // in MHz; other quantities in MiB
	quantity func(s *v1alpha1.NamespaceSettings, make bool) **resource.Quantity
	count    func(c *v1alpha1.ObjectCounts) **int64
}

var quotaFields = []quotaField{
	{name: "cpu_limit", cpu: true, quantity: func(s *v1alpha1.NamespaceSettings, make bool) **resource.Quantity {
		return place(&s.CPU, make, func(c *v1alpha1.CPUAllocation) **resource.Quantity { return &c.Limit })
	}},
	{name: "memory_limit", quantity: func(s *v1alpha1.NamespaceSettings, make bool) **resource.Quantity {
		return place(&s.Memory, make, func(m *v1alpha1.MemoryAllocation) **resource.Quantity { return &m.Limit })
	}},
	{name: "cpu_request_default", cpu: true, quantity: byDefault(func(d *v1alpha1.ContainerDefaults) **resource.Quantity { return &d.CPURequest })},
	{name: "cpu_limit_default", cpu: true, quantity: byDefault(func(d *v1alpha1.ContainerDefaults) **resource.Quantity { return &d.CPULimit })},
	{name: "memory_request_default", quantity: byDefault(func(d *v1alpha1.ContainerDefaults) **resource.Quantity { return &d.MemoryRequest })},
	{name: "memory_limit_default", quantity: byDefault(func(d *v1alpha1.ContainerDefaults) **resource.Quantity { return &d.MemoryLimit })},
	{name: "pod_count", count: func(c *v1alpha1.ObjectCounts) **int64 { return &c.Pods }},
	{name: "service_count", count: func(c *v1alpha1.ObjectCounts) **int64 { return &c.Services }},
	{name: "config_map_count", count: func(c *v1alpha1.ObjectCounts) **int64 { return &c.ConfigMaps }},
	{name: "secret_count", count: func(c *v1alpha1.ObjectCounts) **int64 { return &c.Secrets }},
	{name: "persistent_volume_claim_count", count: func(c *v1alpha1.ObjectCounts) **int64 { return &c.PersistentVolumeClaims }},
	{name: "replication_controller_count", count: func(c *v1alpha1.ObjectCounts) **int64 { return &c.ReplicationControllers }},
	{name: "deployment_count", count: func(c *v1alpha1.ObjectCounts) **int64 { return &c.Deployments }},
	{name: "replica_set_count", count: func(c *v1alpha1.ObjectCounts) **int64 { return &c.ReplicaSets }},
	{name: "stateful_set_count", count: func(c *v1alpha1.ObjectCounts) **int64 { return &c.StatefulSets }},
	{name: "daemon_set_count", count: func(c *v1alpha1.ObjectCounts) **int64 { return &c.DaemonSets }},
	{name: "job_count", count: func(c *v1alpha1.ObjectCounts) **int64 { return &c.Jobs }},
}

var quotaNames = func() []string {
	names := []string{storageRequestLimit}
	for _, f := range quotaFields {
		names = append(names, f.name)
	}
	slices.Sort(names)
	return names
}()

func byDefault(at func(*v1alpha1.ContainerDefaults) **resource.Quantity) func(*v1alpha1.NamespaceSettings, bool) **resource.Quantity {
	return func(s *v1alpha1.NamespaceSettings, make bool) **resource.Quantity {
		return place(&s.ContainerDefaults, make, at)
	}
}

// place is a field of a struct that may not be there; nil if it is not and
// shall not be made.
func place[T, F any](p **T, make bool, at func(*T) *F) *F {
	if *p == nil {
		if !make {
			return nil
		}
		*p = new(T)
	}
	return at(*p)
}

// get is the figure that a namespace has.
func (f quotaField) get(s *v1alpha1.NamespaceSettings, c clock) (n int64, ok bool, err error) {
	if f.count != nil {
		at := place(&s.ObjectCounts, false, f.count)
		if at == nil || *at == nil {
			return 0, false, nil
		}
		return **at, true, nil
	}
	at := f.quantity(s, false)
	if at == nil || *at == nil {
		return 0, false, nil
	}
	if !f.cpu {
		return mib(**at), true, nil
	}
	if !c.known() {
		return 0, false, errNoClock
	}
	return c.mhz(**at), true, nil
}

var errNoClock = problemf(errdefs.ErrUnavailable, "The clock of the namespace's hosts is not known, so that cores cannot be told in MHz: wait until the Supervisor is connected to vCenter (kubectl get supervisor).")

// set changes the figure. One that the namespace has already stays as it is
// written, so that rounding changes nothing that nobody asked for.
func (f quotaField) set(s *v1alpha1.NamespaceSettings, c clock, n int64) error {
	have, ok, err := f.get(s, c)
	if err != nil {
		return err
	}
	if ok && have == n {
		return nil
	}
	if f.count != nil {
		*place(&s.ObjectCounts, true, f.count) = &n
		return nil
	}
	var q resource.Quantity
	switch {
	case !f.cpu && n > maxMiB:
		return problemf(errdefs.ErrInvalidArgument, "resource_spec.%s is %d MiB: the most is %d.", f.name, n, int64(maxMiB))
	case !f.cpu:
		q = bytesOf(n)
	case !c.known():
		return errNoClock
	case n > maxMHz:
		return problemf(errdefs.ErrInvalidArgument, "resource_spec.%s is %d MHz: the most is %d.", f.name, n, int64(maxMHz))
	default:
		q = c.cores(n)
	}
	*f.quantity(s, true) = &q
	return nil
}

// maxMHz is far above any cluster, and far below what a quantity holds.
const maxMHz = 1 << 40

func (f quotaField) clear(s *v1alpha1.NamespaceSettings) {
	if f.count != nil {
		if at := place(&s.ObjectCounts, false, f.count); at != nil && *at != nil {
			*at = nil
			if *s.ObjectCounts == (v1alpha1.ObjectCounts{}) {
				s.ObjectCounts = nil
			}
		}
		return
	}
	at := f.quantity(s, false)
	if at == nil || *at == nil {
		return
	}
	*at = nil
	if s.CPU != nil && *s.CPU == (v1alpha1.CPUAllocation{}) {
		s.CPU = nil
	}
	if s.Memory != nil && *s.Memory == (v1alpha1.MemoryAllocation{}) {
		s.Memory = nil
	}
	if s.ContainerDefaults != nil && *s.ContainerDefaults == (v1alpha1.ContainerDefaults{}) {
		s.ContainerDefaults = nil
	}
}

// quotaOf is a namespace's resource_spec, nil if it has no limits.
func quotaOf(s *v1alpha1.NamespaceSettings, c clock) (quota, error) {
	q := quota{}
	for _, f := range quotaFields {
		n, ok, err := f.get(s, c)
		if err != nil {
			return nil, err
		}
		if ok {
			q[f.name] = quotaValue{n: n}
		}
	}
	if len(q) == 0 {
		return nil, nil
	}
	return q, nil
}

// apply changes a namespace's limits. With whole, those that are not in q go;
// what vSphere has no name for (reservations, shares, CronJobs) stays.
func (q quota) apply(s *v1alpha1.NamespaceSettings, c clock, whole bool) error {
	if v, ok := q[storageRequestLimit]; ok && !v.unset {
		return problemf(errdefs.ErrNotImplemented, "resource_spec.%s is not supported: Atoll limits storage for each policy, give a limit in storage_specs.", storageRequestLimit)
	}
	for _, f := range quotaFields {
		v, ok := q[f.name]
		switch {
		case ok && !v.unset:
			if err := f.set(s, c, v.n); err != nil {
				return err
			}
		case ok || whole:
			f.clear(s)
		}
	}
	return nil
}
