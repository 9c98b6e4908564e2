package podmirror

import (
	"context"
	"fmt"
	"maps"
	"reflect"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic/dynamicinformer"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/tools/cache"

	"github.com/openatoll/atoll/api/v1alpha1"
)

var namespacesResource = schema.GroupVersionResource{Group: "atoll.dev", Version: "v1alpha1", Resource: "supervisornamespaces"}

// Indices of the pods.
const (
	byNamespace = "namespace"
	byNode      = "node"
	byVM        = "vm"
)

// caches are what is known of the cluster, by watches alone and reduced to what
// mirrors need.
type caches struct {
	podInformer, nodeInformer, namespaceInformer cache.SharedIndexInformer

	pods       cache.Indexer // *corev1.Pod
	nodes      cache.Store   // *corev1.Node
	namespaces cache.Store   // *namespacePlaces
}

// namespacePlaces is a SupervisorNamespace as caches keep it.
type namespacePlaces struct {
	metav1.ObjectMeta
	status v1alpha1.SupervisorNamespaceStatus // pools and folder alone
}

// newCaches calls changed for each pod whose mirror may have changed, and host
// for each node.
func newCaches(o Options, changed func(types.NamespacedName), host func(string)) (*caches, error) {
	c := &caches{
		podInformer: coreinformers.NewPodInformer(o.Client, metav1.NamespaceAll, 0, cache.Indexers{
			byNamespace: cache.MetaNamespaceIndexFunc,
			byNode:      podIndex(func(p *corev1.Pod) string { return p.Spec.NodeName }),
			byVM:        podIndex(func(p *corev1.Pod) string { return p.Annotations[v1alpha1.PodVMUUIDAnnotation] }),
		}),
		nodeInformer:      coreinformers.NewNodeInformer(o.Client, 0, cache.Indexers{}),
		namespaceInformer: dynamicinformer.NewFilteredDynamicInformer(o.Dynamic, namespacesResource, metav1.NamespaceAll, 0, cache.Indexers{}, nil).Informer(),
	}
	c.pods, c.nodes, c.namespaces = c.podInformer.GetIndexer(), c.nodeInformer.GetStore(), c.namespaceInformer.GetStore()
	pod := func(o any) {
		if key, ok := podKey(o); ok {
			changed(key)
		}
	}
	indexed := func(index string, name string) {
		for _, key := range c.podsBy(index, name) {
			changed(key)
		}
	}
	for _, add := range []struct {
		informer  cache.SharedIndexInformer
		transform cache.TransformFunc
		tell      func(o any)
	}{
		{c.podInformer, reducePod, pod},
		{c.nodeInformer, reduceNode, func(o any) { host(nameOf(o)); indexed(byNode, nameOf(o)) }},
		{c.namespaceInformer, reduceNamespace, func(o any) { indexed(byNamespace, nameOf(o)) }},
	} {
		if err := add.informer.SetTransform(add.transform); err != nil {
			return nil, err
		}
		if _, err := add.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: add.tell, DeleteFunc: add.tell,
			UpdateFunc: func(old, now any) {
				if !same(old, now) {
					add.tell(now)
				}
			},
		}); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// start watches until ctx ends; it returns when the first lists are complete.
func (c *caches) start(ctx context.Context) error {
	all := []cache.SharedIndexInformer{c.podInformer, c.nodeInformer, c.namespaceInformer}
	var synced []cache.InformerSynced
	for _, i := range all {
		go i.RunWithContext(ctx)
		synced = append(synced, i.HasSynced)
	}
	if !cache.WaitForCacheSync(ctx.Done(), synced...) {
		return ctx.Err()
	}
	return nil
}

// place is where a pod's mirror goes; ok is false while that is not known.
func (c *caches) place(pod *corev1.Pod) (p place, ok bool) {
	o, exists, err := c.namespaces.GetByKey(pod.Namespace)
	if err != nil || !exists {
		return place{}, false
	}
	zone := ""
	if node, exists, err := c.nodes.GetByKey(pod.Spec.NodeName); err == nil && exists {
		zone = node.(*corev1.Node).Labels[corev1.LabelTopologyZone]
	}
	return placeOf(o.(*namespacePlaces).status, zone)
}

// podsBy returns what an index has of a name.
func (c *caches) podsBy(index, name string) (keys []types.NamespacedName) {
	pods, _ := c.pods.ByIndex(index, name) // there is such an index
	for _, o := range pods {
		if key, ok := podKey(o); ok {
			keys = append(keys, key)
		}
	}
	return keys
}

// podOfVM finds the pod that a VM is of.
func (c *caches) podOfVM(uuid string) (*corev1.Pod, bool) {
	pods, err := c.pods.ByIndex(byVM, uuid)
	if err != nil || len(pods) != 1 {
		return nil, false
	}
	return pods[0].(*corev1.Pod), true
}

func podIndex(key func(*corev1.Pod) string) cache.IndexFunc {
	return func(o any) ([]string, error) {
		if pod, ok := o.(*corev1.Pod); ok && key(pod) != "" {
			return []string{key(pod)}, nil
		}
		return nil, nil
	}
}

func nameOf(o any) string {
	if gone, ok := o.(cache.DeletedFinalStateUnknown); ok {
		return gone.Key
	}
	if m, ok := o.(metav1.Object); ok {
		return m.GetName()
	}
	return ""
}

// same is true for updates of what was left out of the caches.
func same(old, now any) bool {
	switch now := now.(type) {
	case *corev1.Pod:
		old, ok := old.(*corev1.Pod)
		if !ok || old.UID != now.UID {
			return false
		}
		a, b := *old, *now
		a.ResourceVersion, b.ResourceVersion = "", ""
		return reflect.DeepEqual(a, b)
	case *namespacePlaces:
		old, ok := old.(*namespacePlaces)
		return ok && slices.Equal(old.status.Pools, now.status.Pools) && equalFolder(old.status.Folder, now.status.Folder)
	case *corev1.Node:
		old, ok := old.(*corev1.Node)
		return ok && maps.Equal(old.Labels, now.Labels) && reflect.DeepEqual(old.Status, now.Status)
	}
	return false
}

func equalFolder(a, b *v1alpha1.FolderStatus) bool {
	return a == b || a != nil && b != nil && *a == *b
}

// reducePod keeps a pod's names, annotations that name its VM, node and what of
// its status says whether it runs.
func reducePod(o any) (any, error) {
	pod, ok := o.(*corev1.Pod)
	if !ok {
		return o, nil
	}
	kept := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, ResourceVersion: pod.ResourceVersion, DeletionTimestamp: pod.DeletionTimestamp},
		Spec:       corev1.PodSpec{NodeName: pod.Spec.NodeName, Hostname: pod.Spec.Hostname, TerminationGracePeriodSeconds: pod.Spec.TerminationGracePeriodSeconds},
		Status:     corev1.PodStatus{Phase: pod.Status.Phase, PodIPs: pod.Status.PodIPs},
	}
	for _, k := range v1alpha1.PodVMAnnotations() {
		if v, ok := pod.Annotations[k]; ok {
			metav1.SetMetaDataAnnotation(&kept.ObjectMeta, k, v)
		}
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReadyToStartContainers {
			kept.Status.Conditions = []corev1.PodCondition{{Type: c.Type, Status: c.Status}}
		}
	}
	return kept, nil
}

// reduceNode keeps a node's zone, and what it is as a host.
func reduceNode(o any) (any, error) {
	node, ok := o.(*corev1.Node)
	if !ok {
		return o, nil
	}
	kept := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node.Name, ResourceVersion: node.ResourceVersion}}
	for _, k := range []string{corev1.LabelTopologyZone, v1alpha1.LabelAccelerator} {
		if v := node.Labels[k]; v != "" {
			metav1.SetMetaDataLabel(&kept.ObjectMeta, k, v)
		}
	}
	kept.Status.Capacity = corev1.ResourceList{corev1.ResourceCPU: *resource.NewQuantity(node.Status.Capacity.Cpu().Value(), resource.DecimalSI), corev1.ResourceMemory: *resource.NewQuantity(node.Status.Capacity.Memory().Value(), resource.BinarySI)}
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady {
			kept.Status.Conditions = []corev1.NodeCondition{{Type: c.Type, Status: c.Status}}
		}
	}
	return kept, nil
}

// reduceNamespace keeps where a SupervisorNamespace's pools and folder are.
func reduceNamespace(o any) (any, error) {
	u, ok := o.(*unstructured.Unstructured)
	if !ok {
		return o, nil
	}
	var ns v1alpha1.SupervisorNamespace
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &ns); err != nil {
		return nil, fmt.Errorf("SupervisorNamespace %s: %w", u.GetName(), err)
	}
	kept := &namespacePlaces{ObjectMeta: metav1.ObjectMeta{Name: ns.Name, ResourceVersion: ns.ResourceVersion}}
	kept.status.Folder = ns.Status.Folder
	for _, p := range ns.Status.Pools {
		kept.status.Pools = append(kept.status.Pools, v1alpha1.PoolStatus{Zone: p.Zone, ID: p.ID})
	}
	return kept, nil
}
