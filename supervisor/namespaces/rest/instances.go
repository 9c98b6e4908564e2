package rest

import (
	"context"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// createSpec is Instances.CreateSpec, createSpecV2 what 8.0 has in its place.
type createSpec struct {
	Cluster   string `json:"cluster"`
	Namespace string `json:"namespace"`
	settings
}

type createSpecV2 struct {
	Supervisor string      `json:"supervisor"`
	Namespace  string      `json:"namespace"`
	Zones      *[]zoneSpec `json:"zones"`
	settings
}

type zoneSpec struct {
	Zone                string `json:"zone"`
	VMReservations      absent `json:"vm_reservations"`
	CPULimit            absent `json:"cpu_limit"`
	MemoryLimit         absent `json:"memory_limit"`
	CPUReservation      absent `json:"cpu_reservation"`
	MemoryReservation   absent `json:"memory_reservation"`
	ResourceAllocation  absent `json:"resource_allocation"`
	ReservedAllocations absent `json:"reserved_vm_class_allocations"`
}

// updateSpec is Instances.UpdateSpec; SetSpec is the same but for zones, which
// PUT refuses.
type updateSpec struct {
	Zones *[]zoneSpec `json:"zones"`
	settings
}

func zoneNames(specs *[]zoneSpec) ([]string, error) {
	if specs == nil {
		return nil, nil
	}
	var names []string
	for _, z := range *specs {
		if z.VMReservations != nil || z.CPULimit != nil || z.MemoryLimit != nil || z.CPUReservation != nil || z.MemoryReservation != nil || z.ResourceAllocation != nil || z.ReservedAllocations != nil {
			return nil, problemf(errdefs.ErrNotImplemented, "Limits of a single zone (zone %q) are not supported: the limit of a namespace is split evenly over its zones. Give resource_spec.", z.Zone)
		}
		names = append(names, z.Zone)
	}
	return names, nil
}

func (h *Handler) createInstance(r *call) (any, error) {
	var spec createSpec
	if err := r.decode(&spec); err != nil {
		return nil, err
	}
	sv, err := h.supervisor(r.Context())
	if err != nil {
		return nil, err
	}
	zone, err := h.zoneOf(r, sv, spec.Cluster)
	if err != nil {
		return nil, err
	}
	if err := h.require(r, privilegeConfigure, "to make a namespace", scopeOfZones([]v1alpha1.ZoneStatus{zone})); err != nil {
		return nil, err
	}
	var zones []string
	if len(sv.Spec.Zones) > 1 {
		zones = []string{zone.Name}
	}
	return nil, h.create(r.Context(), sv, spec.Namespace, zones, &spec.settings)
}

// zoneOf is the Supervisor's zone of a cluster. Whether another one is a cluster
// at all is vCenter's to say.
func (h *Handler) zoneOf(r *call, sv *v1alpha1.Supervisor, cluster string) (v1alpha1.ZoneStatus, error) {
	if cluster == "" {
		return v1alpha1.ZoneStatus{}, problemf(errdefs.ErrInvalidArgument, "cluster is missing: give the managed object id of one of the Supervisor's clusters (govc namespace.cluster.ls).")
	}
	for _, z := range sv.Status.Zones {
		if z.Cluster == cluster {
			return z, nil
		}
	}
	if _, err := h.vcenter.Allowed(r.Context(), r.user, privilegeRead, []Entity{{Kind: "ClusterComputeResource", ID: cluster}}); err != nil {
		return v1alpha1.ZoneStatus{}, err
	}
	return v1alpha1.ZoneStatus{}, problemf(errdefs.ErrNotImplemented, "Cluster %s is not enabled for namespaces: add it to the zones of the Supervisor object with kubectl.", cluster)
}

func (h *Handler) createInstanceV2(r *call) (any, error) {
	var spec createSpecV2
	if err := r.decode(&spec); err != nil {
		return nil, err
	}
	sv, err := h.supervisorNamed(r.Context(), spec.Supervisor)
	if err != nil {
		return nil, err
	}
	zones, err := zoneNames(spec.Zones)
	if err != nil {
		return nil, err
	}
	for _, name := range zones {
		if !slices.ContainsFunc(sv.Spec.Zones, func(z v1alpha1.Zone) bool { return z.Name == name }) {
			return nil, problemf(errdefs.ErrInvalidArgument, "Supervisor %s has no zone %q.", sv.Name, name)
		}
	}
	found := zonesOf(sv, zones)
	if len(found) == 0 {
		return nil, problemf(errdefs.ErrUnavailable, "The clusters of Supervisor %s have not been found in vCenter yet: kubectl get supervisor says why.", sv.Name)
	}
	if err := h.require(r, privilegeConfigure, "to make a namespace", scopeOfZones(found)); err != nil {
		return nil, err
	}
	return nil, h.create(r.Context(), sv, spec.Namespace, zones, &spec.settings)
}

// supervisorNamed is the cluster's Supervisor if that is its name or UID.
func (h *Handler) supervisorNamed(ctx context.Context, id string) (*v1alpha1.Supervisor, error) {
	sv, err := h.supervisor(ctx)
	if err != nil {
		return nil, err
	}
	if id != sv.Name && id != string(sv.UID) {
		return nil, problemf(errdefs.ErrNotFound, "There is no Supervisor %q: this vCenter has %q.", id, sv.Name)
	}
	return sv, nil
}

// checkName says what Kubernetes and vSphere want of a new namespace's name.
func checkName(name string) error {
	if errs := validation.IsDNS1123Label(name); len(errs) > 0 {
		return problemf(errdefs.ErrInvalidArgument, "%q is no name of a namespace: %s.", name, strings.Join(errs, "; "))
	}
	if strings.HasPrefix(name, "vmware-system") {
		return problemf(errdefs.ErrPermissionDenied, "%q begins with vmware-system, which is kept for the system: choose another name.", name)
	}
	if name == metav1.NamespaceDefault || strings.HasPrefix(name, "kube-") {
		return problemf(errdefs.ErrInvalidArgument, "%q is one of the cluster's own namespaces: choose another name.", name)
	}
	return nil
}

func (h *Handler) create(ctx context.Context, sv *v1alpha1.Supervisor, name string, zones []string, s *settings) error {
	if err := checkName(name); err != nil {
		return err
	}
	env, err := h.environment(ctx, sv, zones)
	if err != nil {
		return err
	}
	if env.classes, err = h.classNames(ctx); err != nil {
		return err
	}
	ns := &v1alpha1.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	ns.Spec.Zones = zones
	if err := s.apply(&ns.Spec.NamespaceSettings, env, true); err != nil {
		return err
	}
	// A namespace of Kubernetes alone would be found out by the controller only
	// after this call has said that all is well.
	if err := h.client.Get(ctx, client.ObjectKey{Name: name}, &corev1.Namespace{}); err == nil {
		return errExists(name)
	} else if !apierrors.IsNotFound(err) {
		return kubernetesError(err)
	}
	err = h.client.Create(ctx, ns, fieldOwner)
	if apierrors.IsAlreadyExists(err) {
		return errExists(name)
	}
	return kubernetesError(err)
}

func errExists(name string) error {
	return problemf(errdefs.ErrAlreadyExists, "There is a namespace %q already.", name)
}

// namespace reads one that the user holds the privilege in. Whoever may not read
// it learns no more than from vCenter: that he may not.
func (h *Handler) namespace(r *call, privilege, what string) (*v1alpha1.SupervisorNamespace, *v1alpha1.Supervisor, error) {
	sv, err := h.supervisor(r.Context())
	if err != nil {
		return nil, nil, err
	}
	ns, err := h.read(r.Context(), r.PathValue("namespace"))
	if err != nil {
		return nil, nil, err
	}
	return ns, sv, h.require(r, privilege, what, scopeOf(ns, sv))
}

func (h *Handler) read(ctx context.Context, name string) (*v1alpha1.SupervisorNamespace, error) {
	ns := &v1alpha1.SupervisorNamespace{}
	err := h.client.Get(ctx, client.ObjectKey{Name: name}, ns)
	if apierrors.IsNotFound(err) {
		return nil, problemf(errdefs.ErrNotFound, "There is no namespace %q (govc namespace.ls lists them).", name)
	}
	return ns, kubernetesError(err)
}

func (h *Handler) setInstance(r *call) (any, error) {
	var spec updateSpec
	if err := r.decode(&spec); err != nil {
		return nil, err
	}
	if spec.Zones != nil {
		return nil, problemf(errUnexpectedInput, "zones cannot be set: PATCH adds some.")
	}
	return nil, h.change(r, func(ns *v1alpha1.SupervisorNamespace, env environment) error {
		return spec.apply(&ns.Spec.NamespaceSettings, env, true)
	})
}

func (h *Handler) updateInstance(r *call) (any, error) {
	var spec updateSpec
	if err := r.decode(&spec); err != nil {
		return nil, err
	}
	zones, err := zoneNames(spec.Zones)
	if err != nil {
		return nil, err
	}
	return nil, h.change(r, func(ns *v1alpha1.SupervisorNamespace, env environment) error {
		if spec.Zones != nil {
			ns.Spec.Zones = zones
		}
		return spec.apply(&ns.Spec.NamespaceSettings, env, false)
	})
}

// change reads a namespace, changes it and writes it, anew if somebody else has
// written it in between. A change that changes nothing writes nothing.
func (h *Handler) change(r *call, edit func(*v1alpha1.SupervisorNamespace, environment) error) error {
	return retryConflict(r.Context(), "Namespace "+r.PathValue("namespace"), func() error {
		ns, sv, err := h.namespace(r, privilegeConfigure, "to change the namespace")
		if err != nil {
			return err
		}
		if ns.DeletionTimestamp != nil {
			return problemf(errdefs.ErrFailedPrecondition, "Namespace %s is being deleted.", ns.Name)
		}
		env, err := h.environment(r.Context(), sv, ns.Spec.Zones)
		if err != nil {
			return err
		}
		if env.classes, err = h.classNames(r.Context()); err != nil {
			return err
		}
		was := ns.DeepCopy()
		if err := edit(ns, env); err != nil {
			return err
		}
		if equalJSON(was.Spec, ns.Spec) {
			return nil
		}
		return kubernetesError(h.client.Update(r.Context(), ns, fieldOwner))
	})
}

// deleteInstance asks for the deletion, which goes on after the answer. A
// namespace that is being deleted is no error.
func (h *Handler) deleteInstance(r *call) (any, error) {
	ns, _, err := h.namespace(r, privilegeConfigure, "to delete the namespace")
	if err != nil || ns.DeletionTimestamp != nil {
		return nil, err
	}
	// Not one of the same name that came after it.
	err = h.client.Delete(r.Context(), ns, client.Preconditions{UID: &ns.UID})
	if apierrors.IsNotFound(err) {
		return nil, problemf(errdefs.ErrNotFound, "There is no namespace %q.", ns.Name)
	}
	return nil, kubernetesError(err)
}

func (h *Handler) getInstance(r *call) (any, error) {
	ns, sv, err := h.namespace(r, privilegeRead, "to see the namespace")
	if err != nil {
		return nil, err
	}
	core, err := h.instanceInfo(r.Context(), ns, sv)
	if err != nil {
		return nil, err
	}
	return instanceInfo{Cluster: clusterOf(ns, sv), infoCore: core}, nil
}

func (h *Handler) getInstanceV2(r *call) (any, error) {
	ns, sv, err := h.namespace(r, privilegeRead, "to see the namespace")
	if err != nil {
		return nil, err
	}
	core, err := h.instanceInfo(r.Context(), ns, sv)
	if err != nil {
		return nil, err
	}
	info := instanceInfoV2{Supervisor: sv.Name, Zones: []zoneInfo{}, infoCore: core}
	for _, z := range zonesOf(sv, ns.Spec.Zones) {
		info.Zones = append(info.Zones, zoneInfo{Zone: z.Name, Type: "WORKLOAD"})
	}
	return info, nil
}

func (h *Handler) instanceInfo(ctx context.Context, ns *v1alpha1.SupervisorNamespace, sv *v1alpha1.Supervisor) (infoCore, error) {
	env, err := h.environment(ctx, sv, ns.Spec.Zones)
	if err != nil {
		return infoCore{}, err
	}
	return viewInstance(ns, env)
}

// visible are the namespaces that the user may read.
func (h *Handler) visible(r *call) ([]v1alpha1.SupervisorNamespace, *v1alpha1.Supervisor, error) {
	sv, err := h.supervisor(r.Context())
	if err == errNoSupervisor {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	list := &v1alpha1.SupervisorNamespaceList{}
	if err := h.client.List(r.Context(), list); err != nil {
		return nil, nil, kubernetesError(err)
	}
	scopes := make([]scope, len(list.Items))
	for i := range list.Items {
		scopes[i] = scopeOf(&list.Items[i], sv)
	}
	granted, err := h.granted(r, privilegeRead, scopes)
	if err != nil {
		return nil, nil, err
	}
	var out []v1alpha1.SupervisorNamespace
	for i, ok := range granted {
		if ok {
			out = append(out, list.Items[i])
		}
	}
	return out, sv, nil
}

func (h *Handler) listInstances(r *call) (any, error) {
	list, sv, err := h.visible(r)
	out := []instanceSummary{}
	for i := range list {
		out = append(out, instanceSummary{Cluster: clusterOf(&list[i], sv), summaryCore: viewSummary(&list[i], sv)})
	}
	return out, err
}

func (h *Handler) listInstancesV2(r *call) (any, error) {
	list, sv, err := h.visible(r)
	out := []instanceSummaryV2{}
	for i := range list {
		out = append(out, instanceSummaryV2{Supervisor: sv.Name, summaryCore: viewSummary(&list[i], sv)})
	}
	return out, err
}

// userNamespace is user.Instances.Summary.
type userNamespace struct {
	Namespace  string `json:"namespace"`
	MasterHost string `json:"master_host"`
}

func (h *Handler) listUserNamespaces(r *call) (any, error) {
	list, _, err := h.visible(r)
	out := []userNamespace{}
	for _, ns := range list {
		out = append(out, userNamespace{Namespace: ns.Name, MasterHost: h.cluster.Endpoint})
	}
	return out, err
}
