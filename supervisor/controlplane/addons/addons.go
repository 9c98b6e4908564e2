// Package addons puts into a cluster what the control plane itself needs
// there: rights, the Services of DNS and metrics, admission policies.
package addons

import (
	"bufio"
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"strings"
	"text/template"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// FieldManager owns the applied fields.
const FieldManager = "atoll"

// Values fill the manifests.
type Values struct {
	Address              netip.Addr // of DNS and metrics-server
	DNSAddress           netip.Addr // the Service's
	DNSPort, MetricsPort uint16
	CABundle             string // base64 of the PEM that signed metrics-server's certificate
	ClusterInfo          string // a kubeconfig without a user
}

//go:embed manifests.yaml policies.yaml namespaces.yaml storage.yaml snapshots.yaml
var files embed.FS

// snapshotCRDs are external-snapshotter's, unchanged (Apache-2.0), of the version
// that the control plane links.
//
//go:embed snapshots/*.yaml
var snapshotCRDs embed.FS

// manifestFiles in the order in which they are applied.
var manifestFiles = []string{"manifests.yaml", "policies.yaml", "namespaces.yaml", "storage.yaml", "snapshots.yaml"}

var templates = template.Must(template.New("").Option("missingkey=error").
	Funcs(template.FuncMap{
		"list":   func(words ...string) []string { return words },
		"narrow": func(when, expression string) narrow { return narrow{when, expression} },
	}).ParseFS(files, manifestFiles...))

// A narrow is what policies.yaml adds to a pod's node affinity, and when: the
// fields of an expression, and a condition, both in CEL.
type narrow struct{ If, Expression string }

// resources are the kinds in the manifests: looking them up would cost a
// start a round of API discovery.
var resources = map[schema.GroupKind]struct {
	resource   string
	namespaced bool
}{
	{Group: "", Kind: "ConfigMap"}:                                                    {"configmaps", true},
	{Group: "", Kind: "Service"}:                                                      {"services", true},
	{Group: "discovery.k8s.io", Kind: "EndpointSlice"}:                                {"endpointslices", true},
	{Group: "rbac.authorization.k8s.io", Kind: "Role"}:                                {"roles", true},
	{Group: "rbac.authorization.k8s.io", Kind: "RoleBinding"}:                         {"rolebindings", true},
	{Group: "rbac.authorization.k8s.io", Kind: "ClusterRole"}:                         {"clusterroles", false},
	{Group: "rbac.authorization.k8s.io", Kind: "ClusterRoleBinding"}:                  {"clusterrolebindings", false},
	{Group: "apiextensions.k8s.io", Kind: "CustomResourceDefinition"}:                 {"customresourcedefinitions", false},
	{Group: "apiregistration.k8s.io", Kind: "APIService"}:                             {"apiservices", false},
	{Group: "storage.k8s.io", Kind: "CSIDriver"}:                                      {"csidrivers", false},
	{Group: "storage.k8s.io", Kind: "StorageClass"}:                                   {"storageclasses", false},
	{Group: "snapshot.storage.k8s.io", Kind: "VolumeSnapshotClass"}:                   {"volumesnapshotclasses", false},
	{Group: "node.k8s.io", Kind: "RuntimeClass"}:                                      {"runtimeclasses", false},
	{Group: "admissionregistration.k8s.io", Kind: "MutatingAdmissionPolicy"}:          {"mutatingadmissionpolicies", false},
	{Group: "admissionregistration.k8s.io", Kind: "MutatingAdmissionPolicyBinding"}:   {"mutatingadmissionpolicybindings", false},
	{Group: "admissionregistration.k8s.io", Kind: "ValidatingAdmissionPolicy"}:        {"validatingadmissionpolicies", false},
	{Group: "admissionregistration.k8s.io", Kind: "ValidatingAdmissionPolicyBinding"}: {"validatingadmissionpolicybindings", false},
}

// Objects renders the manifests.
func Objects(v Values) ([]*unstructured.Unstructured, error) {
	objects, err := crds()
	if err != nil {
		return nil, fmt.Errorf("CRDs: %w", err)
	}
	for _, file := range manifestFiles {
		more, err := objectsOf(file, v)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		objects = append(objects, more...)
	}
	return objects, nil
}

func objectsOf(file string, v Values) ([]*unstructured.Unstructured, error) {
	var text bytes.Buffer
	if err := templates.ExecuteTemplate(&text, file, v); err != nil {
		return nil, err
	}
	return parse(&text)
}

// crds come first: the API server takes a moment to serve their kinds.
func crds() ([]*unstructured.Unstructured, error) {
	var objects []*unstructured.Unstructured
	for _, from := range []struct {
		files embed.FS
		glob  string
	}{{v1alpha1.CRDs, "crds/*.yaml"}, {snapshotCRDs, "snapshots/*.yaml"}} {
		names, err := fs.Glob(from.files, from.glob)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			text, err := from.files.ReadFile(name)
			if err != nil {
				return nil, err
			}
			more, err := parse(bytes.NewReader(text))
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			objects = append(objects, more...)
		}
	}
	return objects, nil
}

func parse(text io.Reader) ([]*unstructured.Unstructured, error) {
	reader := utilyaml.NewYAMLReader(bufio.NewReader(text))
	var objects []*unstructured.Unstructured
	for {
		doc, err := reader.Read()
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		if err != nil {
			return nil, err
		}
		content := map[string]any{}
		if err := yaml.UnmarshalStrict(doc, &content); err != nil {
			return nil, fmt.Errorf("document %d: %w", len(objects)+1, err)
		}
		o := &unstructured.Unstructured{Object: content}
		if _, ok := resources[o.GroupVersionKind().GroupKind()]; !ok {
			return nil, fmt.Errorf("document %d has kind %s, whose resource is not listed", len(objects)+1, o.GroupVersionKind())
		}
		objects = append(objects, o)
	}
}

// Apply makes the cluster have all objects as they are, by server-side apply:
// fields that others have added stay. It retries while namespaces and APIs of
// a starting API server are missing, until ctx ends.
func Apply(ctx context.Context, client dynamic.Interface, objects []*unstructured.Unstructured) error {
	for _, o := range objects {
		for {
			err := apply(ctx, client, o)
			if err == nil {
				break
			}
			name := strings.TrimPrefix(o.GetNamespace()+"/"+o.GetName(), "/")
			if apierrors.IsInvalid(err) || apierrors.IsBadRequest(err) {
				return fmt.Errorf("apply %s %s: %w", o.GetKind(), name, err)
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("apply %s %s: %w", o.GetKind(), name, err)
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
	return nil
}

func apply(ctx context.Context, client dynamic.Interface, o *unstructured.Unstructured) error {
	gvk := o.GroupVersionKind()
	r := resources[gvk.GroupKind()]
	all := client.Resource(gvk.GroupVersion().WithResource(r.resource))
	var target dynamic.ResourceInterface = all
	if r.namespaced {
		target = all.Namespace(o.GetNamespace())
	}
	_, err := target.Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: FieldManager, Force: true})
	return err
}
