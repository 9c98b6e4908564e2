package main

import (
	"context"
	"fmt"
	"time"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// The loop's record of a namespace is of the same kind as the controller's, in a
// group that no controller watches: the same schema, and what its checks cost.
const (
	recordCRD   = "crds/atoll.dev_supervisornamespaces.yaml"
	recordGroup = "bench." + v1alpha1.Group
	// servedWithin is how long the API server may take to serve a new kind.
	servedWithin = 30 * time.Second
)

// newRecords makes the kind, and returns a client for it.
func newRecords(ctx context.Context, config *rest.Config) (client.Client, error) {
	text, err := v1alpha1.CRDs.ReadFile(recordCRD)
	if err != nil {
		return nil, err
	}
	crd := &apiextensionsv1.CustomResourceDefinition{}
	if err := yaml.UnmarshalStrict(text, crd); err != nil {
		return nil, fmt.Errorf("%s: %w", recordCRD, err)
	}
	names := &crd.Spec.Names
	names.ShortNames, names.Categories = nil, nil
	crd.Spec.Group, crd.Name = recordGroup, names.Plural+"."+recordGroup
	scheme := runtime.NewScheme()
	if err := apiextensionsv1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	version := schema.GroupVersion{Group: recordGroup, Version: v1alpha1.SchemeGroupVersion.Version}
	scheme.AddKnownTypeWithName(version.WithKind(names.Kind), &v1alpha1.SupervisorNamespace{})
	scheme.AddKnownTypeWithName(version.WithKind(names.ListKind), &v1alpha1.SupervisorNamespaceList{})
	metav1.AddToGroupVersion(scheme, version)
	c, err := client.New(config, client.Options{Scheme: scheme})
	if err != nil {
		return nil, err
	}
	if err := c.Create(ctx, crd); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, servedWithin)
	defer cancel()
	for {
		err := c.List(ctx, &v1alpha1.SupervisorNamespaceList{})
		if err == nil {
			return c, nil
		}
		if perr := pause(ctx, 100*time.Millisecond); perr != nil {
			return nil, fmt.Errorf("the loop's records are not served: %w: %w", perr, err)
		}
	}
}

func (l *plainLoop) recorded(began time.Time) { l.recording += time.Since(began) }

// ask writes down what is wanted, as whoever applies a SupervisorNamespace does.
func (l *plainLoop) ask(ctx context.Context, name string) (*v1alpha1.SupervisorNamespace, error) {
	defer l.recorded(time.Now())
	r := benchSpec(name)
	r.Finalizers = []string{v1alpha1.NamespaceFinalizer}
	return r, l.records.Create(ctx, r)
}

// answer writes down what came of it, all of it at once.
func (l *plainLoop) answer(ctx context.Context, r *v1alpha1.SupervisorNamespace, pool, folder string) error {
	defer l.recorded(time.Now())
	r.Status = *l.status.DeepCopy()
	r.Status.ObservedGeneration = r.Generation
	r.Status.Pools[0].ID, r.Status.Folder.ID = pool, folder
	return l.records.Status().Update(ctx, r)
}
