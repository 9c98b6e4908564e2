package rest

import (
	"bytes"
	"context"
	"encoding/json"
	"math"
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

// classSpec is VirtualMachineClasses.CreateSpec and UpdateSpec. Of an update, a
// figure that is missing stays; so does one that is 0, since govc sends 0 for
// what its user did not give and no class could have it.
type classSpec struct {
	ID                string      `json:"id"`
	CPUs              *int64      `json:"cpu_count"`
	Memory            *int64      `json:"memory_MB"` // MiB, in vSphere's words MB
	CPUReservation    *int64      `json:"cpu_reservation"`
	MemoryReservation *int64      `json:"memory_reservation"`
	Description       *string     `json:"description"`
	ConfigSpec        *configSpec `json:"config_spec"`

	Devices         absent `json:"devices"`
	InstanceStorage absent `json:"instance_storage"`
	ReservedProfile absent `json:"reserved_profile_id"`
	ReservedSlots   absent `json:"reserved_slots"`
}

// configSpec is the part of a vim.vm.ConfigSpec that says no more than the class
// itself. Whatever else it has makes it unsupported.
type configSpec struct {
	cpus, memory *int64
	other        string
}

func (c *configSpec) UnmarshalJSON(b []byte) error {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(b, &fields); err != nil {
		return err
	}
	for name, value := range fields {
		var at **int64
		switch name {
		case "_typeName":
			continue
		case "numCPUs":
			at = &c.cpus
		case "memoryMB":
			at = &c.memory
		default:
			if !bytes.Equal(bytes.TrimSpace(value), []byte("null")) && (c.other == "" || name < c.other) {
				c.other = name
			}
			continue
		}
		if err := json.Unmarshal(value, at); err != nil {
			return problemf(errUnexpectedInput, "config_spec.%s is a whole number, not %s.", name, value)
		}
	}
	return nil
}

// apply writes into a class what a client sent; with whole, size and CPUs are
// needed.
func (s *classSpec) apply(to *v1alpha1.VirtualMachineClassSpec, whole bool) error {
	switch {
	case s.Devices != nil:
		return problemf(errdefs.ErrNotImplemented, "devices are not supported: a VM class of Atoll is CPUs and memory. Leave it out.")
	case s.InstanceStorage != nil, s.ReservedProfile != nil, s.ReservedSlots != nil:
		return problemf(errdefs.ErrNotImplemented, "instance_storage and reserved slots are not supported: a VM class of Atoll is CPUs and memory. Leave them out.")
	case s.ConfigSpec != nil && s.ConfigSpec.other != "":
		return problemf(errdefs.ErrNotImplemented, "config_spec.%s is not supported: a VM class of Atoll is CPUs (numCPUs) and memory (memoryMB).", s.ConfigSpec.other)
	}
	cpus, memory := s.CPUs, s.Memory
	if c := s.ConfigSpec; c != nil {
		for _, p := range []struct {
			name  string
			given **int64
			conf  *int64
		}{{"cpu_count", &cpus, c.cpus}, {"memory_MB", &memory, c.memory}} {
			switch {
			case p.conf == nil:
			case *p.given == nil || **p.given == 0:
				*p.given = p.conf
			case **p.given != *p.conf:
				return problemf(errdefs.ErrInvalidArgument, "%s is %d, but config_spec says %d: give one of them.", p.name, **p.given, *p.conf)
			}
		}
	}
	if err := bounded("cpu_count", cpus, 1, math.MaxInt32, whole); err != nil {
		return err
	}
	if err := bounded("memory_MB", memory, 1, maxMiB, whole); err != nil {
		return err
	}
	if err := bounded("cpu_reservation", s.CPUReservation, 0, 100, false); err != nil {
		return err
	}
	if err := bounded("memory_reservation", s.MemoryReservation, 0, 100, false); err != nil {
		return err
	}
	if cpus != nil && *cpus != 0 {
		to.CPUs = int32(*cpus)
	}
	if memory != nil && *memory != 0 && mib(to.Memory) != *memory {
		to.Memory = bytesOf(*memory)
	}
	if s.CPUReservation != nil {
		to.CPUReservationPercent = int32(*s.CPUReservation)
	}
	if s.MemoryReservation != nil {
		to.MemoryReservationPercent = int32(*s.MemoryReservation)
	}
	if s.Description != nil {
		to.Description = *s.Description
	}
	return nil
}

// bounded is ErrInvalidArgument for a figure out of its range; where it is not
// needed, none and 0 are within.
func bounded(name string, n *int64, low, high int64, needed bool) error {
	switch {
	case n == nil && needed:
		return problemf(errdefs.ErrInvalidArgument, "%s is missing.", name)
	case n == nil, *n == 0 && !needed:
		return nil
	case *n < low || *n > high:
		return problemf(errdefs.ErrInvalidArgument, "%s is %d: it is %d to %d.", name, *n, low, high)
	}
	return nil
}

// classInfo is VirtualMachineClasses.Info.
type classInfo struct {
	ID                string            `json:"id"`
	CPUs              int64             `json:"cpu_count"`
	Memory            int64             `json:"memory_MB"`
	CPUReservation    int64             `json:"cpu_reservation,omitempty"`
	MemoryReservation int64             `json:"memory_reservation,omitempty"`
	Description       string            `json:"description"`
	ConfigStatus      string            `json:"config_status"` // READY or REMOVING
	Messages          []instanceMessage `json:"messages"`
	Namespaces        []string          `json:"namespaces"`
	VMs               []string          `json:"vms"` // managed object ids
	Devices           struct{}          `json:"devices"`
}

func viewClass(c *v1alpha1.VirtualMachineClass, use classUse) classInfo {
	info := classInfo{
		ID:                c.Name,
		CPUs:              int64(c.Spec.CPUs),
		Memory:            mib(c.Spec.Memory),
		CPUReservation:    int64(c.Spec.CPUReservationPercent),
		MemoryReservation: int64(c.Spec.MemoryReservationPercent),
		Description:       c.Spec.Description,
		ConfigStatus:      "READY",
		Messages:          []instanceMessage{},
		Namespaces:        append([]string{}, use.namespaces...),
		VMs:               append([]string{}, use.vms...),
	}
	if c.DeletionTimestamp != nil {
		info.ConfigStatus = statusRemoving
	}
	return info
}

// classUse is who uses a class.
type classUse struct{ namespaces, vms []string }

// classUses reads which namespaces name classes, and which pods' VMs have one.
func (h *Handler) classUses(ctx context.Context) (map[string]classUse, error) {
	namespaces := &v1alpha1.SupervisorNamespaceList{}
	if err := h.client.List(ctx, namespaces); err != nil {
		return nil, kubernetesError(err)
	}
	pods := &corev1.PodList{}
	if err := h.client.List(ctx, pods, client.HasLabels{v1alpha1.LabelVMClass}); err != nil {
		return nil, kubernetesError(err)
	}
	uses := map[string]classUse{}
	for _, ns := range namespaces.Items {
		for _, class := range ns.Spec.VMClasses {
			u := uses[class]
			u.namespaces = append(u.namespaces, ns.Name)
			uses[class] = u
		}
	}
	for _, pod := range pods.Items {
		if moid, _, ok := strings.Cut(pod.Annotations[v1alpha1.PodVMMoIDAnnotation], ":"); ok {
			class := pod.Labels[v1alpha1.LabelVMClass]
			u := uses[class]
			u.vms = append(u.vms, moid)
			uses[class] = u
		}
	}
	for class, u := range uses {
		slices.Sort(u.namespaces)
		slices.Sort(u.vms)
		uses[class] = u
	}
	return uses, nil
}

func (h *Handler) requireClasses(r *call, privilege, what string) error {
	return h.require(r, privilege, what, scope{entities: []Entity{Root}})
}

func (h *Handler) listClasses(r *call) (any, error) {
	if err := h.requireClasses(r, privilegeRead, "to see VM classes"); err != nil {
		return nil, err
	}
	uses, err := h.classUses(r.Context())
	if err != nil {
		return nil, err
	}
	list := &v1alpha1.VirtualMachineClassList{}
	if err := h.client.List(r.Context(), list); err != nil {
		return nil, kubernetesError(err)
	}
	out := []classInfo{}
	for i := range list.Items {
		out = append(out, viewClass(&list.Items[i], uses[list.Items[i].Name]))
	}
	return out, nil
}

func (h *Handler) class(r *call) (*v1alpha1.VirtualMachineClass, error) {
	c := &v1alpha1.VirtualMachineClass{}
	name := r.PathValue("class")
	err := h.client.Get(r.Context(), client.ObjectKey{Name: name}, c)
	if apierrors.IsNotFound(err) {
		return nil, problemf(errdefs.ErrNotFound, "There is no VM class %q (govc namespace.vmclass.ls lists them).", name)
	}
	return c, kubernetesError(err)
}

func (h *Handler) getClass(r *call) (any, error) {
	if err := h.requireClasses(r, privilegeRead, "to see VM classes"); err != nil {
		return nil, err
	}
	c, err := h.class(r)
	if err != nil {
		return nil, err
	}
	uses, err := h.classUses(r.Context())
	if err != nil {
		return nil, err
	}
	return viewClass(c, uses[c.Name]), nil
}

func (h *Handler) createClass(r *call) (any, error) {
	if err := h.requireClasses(r, privilegeClasses, "to make a VM class"); err != nil {
		return nil, err
	}
	var spec classSpec
	if err := r.decode(&spec); err != nil {
		return nil, err
	}
	if errs := validation.IsDNS1123Label(spec.ID); len(errs) > 0 {
		return nil, problemf(errdefs.ErrInvalidArgument, "%q is no name of a VM class: %s.", spec.ID, strings.Join(errs, "; "))
	}
	c := &v1alpha1.VirtualMachineClass{ObjectMeta: metav1.ObjectMeta{Name: spec.ID}}
	if err := spec.apply(&c.Spec, true); err != nil {
		return nil, err
	}
	err := h.client.Create(r.Context(), c, fieldOwner)
	if apierrors.IsAlreadyExists(err) {
		return nil, problemf(errdefs.ErrAlreadyExists, "There is a VM class %q already.", spec.ID)
	}
	return nil, kubernetesError(err)
}

func (h *Handler) updateClass(r *call) (any, error) {
	if err := h.requireClasses(r, privilegeClasses, "to change a VM class"); err != nil {
		return nil, err
	}
	var spec classSpec
	if err := r.decode(&spec); err != nil {
		return nil, err
	}
	if spec.ID != "" && spec.ID != r.PathValue("class") {
		return nil, problemf(errdefs.ErrInvalidArgument, "id is %q, but the class is %q: a VM class is not renamed.", spec.ID, r.PathValue("class"))
	}
	return nil, retryConflict(r.Context(), "VM class "+r.PathValue("class"), func() error {
		c, err := h.class(r)
		if err != nil {
			return err
		}
		was := c.DeepCopy()
		if err := spec.apply(&c.Spec, false); err != nil {
			return err
		}
		if equalJSON(was.Spec, c.Spec) {
			return nil
		}
		return kubernetesError(h.client.Update(r.Context(), c, fieldOwner))
	})
}

// deleteClass refuses while a namespace names the class: its pods could not be
// placed any more.
func (h *Handler) deleteClass(r *call) (any, error) {
	if err := h.requireClasses(r, privilegeClasses, "to delete a VM class"); err != nil {
		return nil, err
	}
	c, err := h.class(r)
	if err != nil {
		return nil, err
	}
	uses, err := h.classUses(r.Context())
	if err != nil {
		return nil, err
	}
	if u := uses[c.Name]; len(u.namespaces) > 0 {
		return nil, problemf(errInUse, "VM class %s is used by namespaces %s: take it from them first.", c.Name, strings.Join(u.namespaces, ", "))
	}
	err = h.client.Delete(r.Context(), c, client.Preconditions{UID: &c.UID})
	if apierrors.IsNotFound(err) {
		return nil, problemf(errdefs.ErrNotFound, "There is no VM class %q.", c.Name)
	}
	return nil, kubernetesError(err)
}
