package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"time"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// Who is let into each namespace, in the embedded vCenter's single sign-on.
const (
	benchUser  = "bench-owner"
	benchGroup = "bench-editors"
)

// dialVCenter signs in as the administrator, from the environment that `atoll
// enter` sets.
func dialVCenter(ctx context.Context) (*govmomi.Client, error) {
	u, err := soap.ParseURL(os.Getenv("GOVC_URL"))
	if err != nil || u == nil {
		return nil, fmt.Errorf("the cluster has no vCenter: GOVC_URL is %q: %w", os.Getenv("GOVC_URL"), errors.Join(err))
	}
	sc := soap.NewClient(u, false)
	if err := sc.SetRootCAs(os.Getenv("GOVC_TLS_CA_CERTS")); err != nil {
		return nil, err
	}
	vim, err := vim25.NewClient(ctx, sc)
	if err != nil {
		return nil, err
	}
	c := &govmomi.Client{Client: vim, SessionManager: session.NewManager(vim)}
	return c, c.Login(ctx, url.UserPassword(os.Getenv("GOVC_USERNAME"), os.Getenv("GOVC_PASSWORD")))
}

func makeVCenterUsers(ctx context.Context, data string) error {
	cmd := exec.CommandContext(ctx, "bin/atoll", "--data-dir", data, "vcenter", "user", "set", benchUser, "--group", benchGroup)
	cmd.Stdin = bytes.NewBufferString(rand.Text() + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("atoll vcenter user set: %w\n%s", err, out)
	}
	return nil
}

// A plainLoop makes what the controller makes for a namespace, call by call:
// copies of what it made for one, beside those of the others, under names and
// attributes that the controller does not take for its own, and a record of each:
// 15 calls, none of them a question. It waits for no task, since there is none.
type plainLoop struct {
	*namespaceBench
	records      client.Client
	status       v1alpha1.SupervisorNamespaceStatus
	recording    time.Duration // what records took so far
	parentPool   *object.ResourcePool
	parentFolder *object.Folder
	fields       *object.CustomFieldsManager
	rights       *object.AuthorizationManager
	pool         types.ResourceConfigSpec
	onPool       pattern
	onFolder     pattern
	namespace    corev1.Namespace
	quotas       []corev1.ResourceQuota
	limits       []corev1.LimitRange
	bindings     []rbacv1.RoleBinding
}

// A pattern is what is set on a pool or a folder.
type pattern struct {
	attributes  []types.CustomFieldStringValue
	permissions []types.Permission
}

// newPlainLoop reads what the controller made for a namespace.
func (b *namespaceBench) newPlainLoop(ctx context.Context, of string) (*plainLoop, error) {
	l := &plainLoop{namespaceBench: b, rights: object.NewAuthorizationManager(b.vim.Client)}
	var err error
	if l.fields, err = object.GetCustomFieldsManager(b.vim.Client); err != nil {
		return nil, err
	}
	ns := &v1alpha1.SupervisorNamespace{}
	if err := b.admin.Get(ctx, client.ObjectKey{Name: of}, ns); err != nil {
		return nil, err
	}
	if len(ns.Status.Pools) != 1 || ns.Status.Folder == nil {
		return nil, fmt.Errorf("namespace %s has %d pools and folder %v: one of each is wanted", of, len(ns.Status.Pools), ns.Status.Folder)
	}
	l.status = ns.Status
	if l.records, err = newRecords(ctx, b.config); err != nil {
		return nil, err
	}
	if err := l.readVSphere(ctx, ns); err != nil {
		return nil, err
	}
	return l, l.readKubernetes(ctx, of)
}

func (l *plainLoop) readVSphere(ctx context.Context, ns *v1alpha1.SupervisorNamespace) error {
	c := l.vim.Client
	var pool mo.ResourcePool
	id := types.ManagedObjectReference{Type: "ResourcePool", Value: ns.Status.Pools[0].ID}
	if err := object.NewResourcePool(c, id).Properties(ctx, id, []string{"config", "parent", "permission", "value"}, &pool); err != nil {
		return err
	}
	var folder mo.Folder
	id = types.ManagedObjectReference{Type: "Folder", Value: ns.Status.Folder.ID}
	if err := object.NewFolder(c, id).Properties(ctx, id, []string{"parent", "permission", "value"}, &folder); err != nil {
		return err
	}
	l.pool = types.ResourceConfigSpec{CpuAllocation: pool.Config.CpuAllocation, MemoryAllocation: pool.Config.MemoryAllocation}
	var err error
	if l.onPool, err = l.patternOf(ctx, pool.Value, pool.Permission); err != nil {
		return err
	}
	if l.onFolder, err = l.patternOf(ctx, folder.Value, folder.Permission); err != nil {
		return err
	}
	return l.makeParents(ctx, *pool.Parent, *folder.Parent)
}

// patternOf has attributes of its own in place of the controller's.
func (l *plainLoop) patternOf(ctx context.Context, values []types.BaseCustomFieldValue, permissions []types.Permission) (pattern, error) {
	defs, err := l.fields.Field(ctx)
	if err != nil {
		return pattern{}, err
	}
	var p pattern
	for _, v := range values {
		s, ok := v.(*types.CustomFieldStringValue)
		if !ok {
			continue
		}
		name := "bench." + defs.ByKey(s.Key).Name
		key, err := l.fields.FindKey(ctx, name)
		if errors.Is(err, object.ErrKeyNameNotFound) {
			var def *types.CustomFieldDef
			if def, err = l.fields.Add(ctx, name, "", nil, nil); err == nil {
				key = def.Key
			}
		}
		if err != nil {
			return p, err
		}
		p.attributes = append(p.attributes, types.CustomFieldStringValue{CustomFieldValue: types.CustomFieldValue{Key: key}, Value: s.Value})
	}
	for _, r := range permissions {
		p.permissions = append(p.permissions, types.Permission{Principal: r.Principal, Group: r.Group, RoleId: r.RoleId, Propagate: r.Propagate})
	}
	if len(p.attributes) == 0 || len(p.permissions) == 0 {
		return p, fmt.Errorf("the controller's object has %d attributes and %d permissions: there is nothing to copy", len(p.attributes), len(p.permissions))
	}
	return p, nil
}

// makeParents makes a parent pool and a parent folder beside the controller's.
func (l *plainLoop) makeParents(ctx context.Context, pool, folder types.ManagedObjectReference) error {
	c := l.vim.Client
	up := func(id types.ManagedObjectReference) (types.ManagedObjectReference, error) {
		var e mo.ManagedEntity
		err := object.NewCommon(c, id).Properties(ctx, id, []string{"parent"}, &e)
		if err == nil && e.Parent == nil {
			err = fmt.Errorf("%s has no parent", id.Value)
		}
		if err != nil {
			return id, err
		}
		return *e.Parent, nil
	}
	root, err := up(pool)
	if err != nil {
		return err
	}
	free := types.DefaultResourceConfigSpec()
	if l.parentPool, err = object.NewResourcePool(c, root).Create(ctx, "Bench", free); err != nil {
		return err
	}
	vms, err := up(folder)
	if err != nil {
		return err
	}
	l.parentFolder, err = object.NewFolder(c, vms).CreateFolder(ctx, "Bench")
	return err
}

func (l *plainLoop) readKubernetes(ctx context.Context, of string) error {
	ns, err := l.kube.CoreV1().Namespaces().Get(ctx, of, metav1.GetOptions{})
	if err != nil {
		return err
	}
	l.namespace.ObjectMeta = plain(ns.ObjectMeta)
	quotas, err := l.kube.CoreV1().ResourceQuotas(of).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, q := range quotas.Items {
		l.quotas = append(l.quotas, corev1.ResourceQuota{ObjectMeta: plain(q.ObjectMeta), Spec: q.Spec})
	}
	limits, err := l.kube.CoreV1().LimitRanges(of).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, r := range limits.Items {
		l.limits = append(l.limits, corev1.LimitRange{ObjectMeta: plain(r.ObjectMeta), Spec: r.Spec})
	}
	bindings, err := l.kube.RbacV1().RoleBindings(of).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, r := range bindings.Items {
		l.bindings = append(l.bindings, rbacv1.RoleBinding{ObjectMeta: plain(r.ObjectMeta), RoleRef: r.RoleRef, Subjects: r.Subjects})
	}
	if len(l.quotas) == 0 || len(l.limits) == 0 || len(l.bindings) == 0 {
		return fmt.Errorf("the controller made %d quotas, %d limit ranges and %d role bindings in namespace %s: there is nothing to copy", len(l.quotas), len(l.limits), len(l.bindings), of)
	}
	return nil
}

// plain keeps what a loop would write: the same number of labels and
// annotations, none of them Atoll's.
func plain(m metav1.ObjectMeta) metav1.ObjectMeta {
	out := metav1.ObjectMeta{Name: m.Name, Labels: map[string]string{}, Annotations: map[string]string{}}
	for _, k := range slices.Sorted(maps.Keys(m.Labels)) {
		if k != corev1.LabelMetadataName { // the API server's
			out.Labels["bench."+k] = m.Labels[k]
		}
	}
	for k, v := range m.Annotations {
		out.Annotations["bench."+k] = v
	}
	return out
}

// run makes so many namespaces one after another, and returns how long it took.
func (l *plainLoop) run(ctx context.Context, prefix string, n int) (time.Duration, error) {
	began, told := time.Now(), time.Now()
	for i := range n {
		name := fmt.Sprint(prefix, i)
		if err := l.make(ctx, name); err != nil {
			return 0, fmt.Errorf("namespace %s of the loop: %w", name, err)
		}
		if time.Since(told) > 10*time.Second {
			told = time.Now()
			say("%d of %d are made", i+1, n)
		}
	}
	return time.Since(began), nil
}

func (l *plainLoop) make(ctx context.Context, name string) error {
	record, err := l.ask(ctx, name)
	if err != nil {
		return err
	}
	pool, folder, err := l.makeVSphere(ctx, name)
	if err != nil {
		return err
	}
	if err := l.makeKubernetes(ctx, name); err != nil {
		return err
	}
	return l.answer(ctx, record, pool, folder)
}

// makeVSphere returns the ids of the pool and the folder.
func (l *plainLoop) makeVSphere(ctx context.Context, name string) (string, string, error) {
	pool, err := l.parentPool.Create(ctx, name, l.pool)
	if err != nil {
		return "", "", err
	}
	folder, err := l.parentFolder.CreateFolder(ctx, name)
	if err != nil {
		return "", "", err
	}
	return pool.Reference().Value, folder.Reference().Value,
		errors.Join(l.set(ctx, pool.Reference(), l.onPool), l.set(ctx, folder.Reference(), l.onFolder))
}

func (l *plainLoop) set(ctx context.Context, id types.ManagedObjectReference, p pattern) error {
	for _, a := range p.attributes {
		if err := l.fields.Set(ctx, id, a.Key, a.Value); err != nil {
			return err
		}
	}
	return l.rights.SetEntityPermissions(ctx, id, p.permissions)
}

func (l *plainLoop) makeKubernetes(ctx context.Context, name string) error {
	create := metav1.CreateOptions{}
	ns := l.namespace.DeepCopy()
	ns.Name = name
	if _, err := l.kube.CoreV1().Namespaces().Create(ctx, ns, create); err != nil {
		return err
	}
	for i := range l.quotas {
		if _, err := l.kube.CoreV1().ResourceQuotas(name).Create(ctx, &l.quotas[i], create); err != nil {
			return err
		}
	}
	for i := range l.limits {
		if _, err := l.kube.CoreV1().LimitRanges(name).Create(ctx, &l.limits[i], create); err != nil {
			return err
		}
	}
	for i := range l.bindings {
		if _, err := l.kube.RbacV1().RoleBindings(name).Create(ctx, &l.bindings[i], create); err != nil {
			return err
		}
	}
	return nil
}
