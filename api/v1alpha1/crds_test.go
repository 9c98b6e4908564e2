package v1alpha1

import (
	"context"
	"io/fs"
	"strings"
	"testing"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	structuralschema "k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	apiservervalidation "k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	"k8s.io/apimachinery/pkg/util/json"
	"k8s.io/apimachinery/pkg/util/validation/field"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"
)

// loadCRDs are the embedded CRDs as the API server takes them, by kind.
func loadCRDs(t *testing.T) map[string]*apiextensions.CustomResourceDefinition {
	t.Helper()
	files, err := fs.Glob(CRDs, "crds/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	crds := map[string]*apiextensions.CustomResourceDefinition{}
	for _, file := range files {
		b, err := CRDs.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		v1 := &apiextensionsv1.CustomResourceDefinition{}
		if err := yaml.UnmarshalStrict(b, v1); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		apiextensionsv1.SetDefaults_CustomResourceDefinition(v1)
		apiextensionsv1.SetDefaults_CustomResourceDefinitionSpec(&v1.Spec)
		crd := &apiextensions.CustomResourceDefinition{}
		if err := apiextensionsv1.Convert_v1_CustomResourceDefinition_To_apiextensions_CustomResourceDefinition(v1, crd, nil); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		crd.Status.StoredVersions = []string{"v1alpha1"}
		crds[crd.Spec.Names.Kind] = crd
	}
	return crds
}

// The API server refuses a CRD whose schema is not structural, whose defaults
// do not fit, or whose rules may cost too much.
func TestCRDsAreAccepted(t *testing.T) {
	crds := loadCRDs(t)
	if len(crds) != 5 {
		t.Fatalf("%d CRDs, want 5", len(crds))
	}
	for kind, crd := range crds {
		for _, err := range validation.ValidateCustomResourceDefinition(t.Context(), crd) {
			t.Errorf("%s: %v", kind, err)
		}
	}
}

// A checker validates objects as the API server does.
type checker struct {
	structural *structuralschema.Structural
	schema     apiservervalidation.SchemaValidator
	rules      *cel.Validator
}

func newChecker(t *testing.T, crd *apiextensions.CustomResourceDefinition) checker {
	t.Helper()
	props := crd.Spec.Validation
	if props == nil {
		props = crd.Spec.Versions[0].Schema
	}
	structural, err := structuralschema.NewStructural(props.OpenAPIV3Schema)
	if err != nil {
		t.Fatal(err)
	}
	schema, _, err := apiservervalidation.NewSchemaValidator(props.OpenAPIV3Schema)
	if err != nil {
		t.Fatal(err)
	}
	return checker{structural, schema, cel.NewValidator(structural, true, celconfig.PerCallLimit)}
}

// check returns what is wrong with a document, and with its change from old,
// unless old is empty.
func (c checker) check(t *testing.T, doc, old string) string {
	t.Helper()
	parse := func(doc string) map[string]any {
		if doc == "" {
			return nil
		}
		o := map[string]any{}
		b, err := yaml.YAMLToJSONStrict([]byte(doc))
		if err == nil {
			err = json.Unmarshal(b, &o)
		}
		if err != nil {
			t.Fatalf("%v in %s", err, doc)
		}
		defaulting.Default(o, c.structural)
		return o
	}
	object := parse(doc)
	errs := apiservervalidation.ValidateCustomResource(nil, object, c.schema)
	var before any
	if o := parse(old); o != nil {
		before = o
	}
	more, _ := c.rules.Validate(context.Background(), field.NewPath(""), c.structural, object, before, celconfig.RuntimeCELCostBudget)
	var out []string
	for _, err := range append(errs, more...) {
		out = append(out, err.Error())
	}
	return strings.Join(out, "\n")
}

func TestValidation(t *testing.T) {
	crds := loadCRDs(t)
	checkers := map[string]checker{}
	for kind, crd := range crds {
		checkers[kind] = newChecker(t, crd)
	}
	const sv = "metadata: {name: default}\nspec: {vCenter: {server: vc, credentialsSecret: {name: s}}, zones: [{name: a, cluster: c}]}"
	settings := func(s string) string { return "metadata: {name: shop}\nspec: {" + s + "}" }
	template := func(s string) string {
		return "metadata: {name: t}\nspec: {allowedUsers: [{kind: Group, name: devs}], settings: {" + s + "}}"
	}
	for _, c := range []struct {
		name, kind, doc, old string
		want                 string // part of the error; empty: it is accepted
	}{
		{"supervisor", "Supervisor", sv, "", ""},
		{"second supervisor", "Supervisor", strings.Replace(sv, "default", "other", 1), "", "name it default"},
		{"url as server", "Supervisor", strings.Replace(sv, "server: vc", "server: 'https://vc'", 1), "", "leave out https://"},
		{"two ways to trust", "Supervisor", strings.Replace(sv, "server: vc", "server: vc, caBundle: YQ==, thumbprint: '"+strings.Repeat("0a", 32)+"'", 1), "", "not both"},
		{"short thumbprint", "Supervisor", strings.Replace(sv, "server: vc", "server: vc, thumbprint: 0a0b", 1), "", "thumbprint"},
		{"no zone", "Supervisor", strings.Replace(sv, "[{name: a, cluster: c}]", "[]", 1), "", "at least 1 items"},
		{"other parent pool", "Supervisor", sv + "\n", "metadata: {name: default}\nspec: {parentPool: P, vCenter: {server: vc, credentialsSecret: {name: s}}, zones: [{name: a, cluster: c}]}", "parentPool cannot be changed"},

		{"empty namespace", "SupervisorNamespace", "metadata: {name: shop}", "", ""},
		{"everything", "SupervisorNamespace", settings(`zones: [a], description: d, cpu: {limit: 8, reservation: 500m, shares: {level: custom, value: 6000}}, memory: {limit: 16Gi, reservation: 4Gi},
  containerDefaults: {cpuRequest: 100m, cpuLimit: 1, memoryRequest: 64Mi, memoryLimit: 1Gi}, storagePolicies: [{name: p, limit: 1Gi}], objectCounts: {pods: 5},
  access: [{kind: User, name: ada, role: edit}, {kind: Group, name: ada, role: view}], vmClasses: [c], tags: [a/b], attributes: {owner: ada}, driftPolicy: {limits: Mend, structure: Adopt, quota: Adopt}`), "", ""},
		{"name with a dot", "SupervisorNamespace", "metadata: {name: shop.a}", "", "without dots"},
		{"cluster's own name", "SupervisorNamespace", "metadata: {name: kube-system}", "", "choose another name"},
		{"cpu reservation above limit", "SupervisorNamespace", settings("cpu: {limit: 1, reservation: 1500m}"), "", "cpu.reservation is above cpu.limit"},
		{"memory reservation above limit", "SupervisorNamespace", settings("memory: {limit: 1Gi, reservation: 1025Mi}"), "", "memory.reservation is above memory.limit"},
		{"no cpu", "SupervisorNamespace", settings("cpu: {limit: 0}"), "", "at least 1m"},
		{"negative reservation", "SupervisorNamespace", settings("memory: {reservation: -1Gi}"), "", "must not be negative"},
		{"shares without a number", "SupervisorNamespace", settings("cpu: {shares: {level: custom}}"), "", "give value with level custom"},
		{"shares with a number too many", "SupervisorNamespace", settings("cpu: {shares: {level: low, value: 5}}"), "", "give value with level custom"},
		{"default request above default limit", "SupervisorNamespace", settings("containerDefaults: {cpuRequest: 2, cpuLimit: 1}"), "", "cpuRequest is above cpuLimit"},
		{"default limit above limit", "SupervisorNamespace", settings("memory: {limit: 1Gi}, containerDefaults: {memoryLimit: 2Gi}"), "", "no container could start"},
		{"policy twice", "SupervisorNamespace", settings("storagePolicies: [{name: p}, {name: p}]"), "", ""}, // list maps are checked elsewhere
		{"negative storage", "SupervisorNamespace", settings("storagePolicies: [{name: p, limit: -1Gi}]"), "", "a storage limit must not be negative"},
		{"negative count", "SupervisorNamespace", settings("objectCounts: {pods: -1}"), "", "greater than or equal to 0"},
		{"unknown role", "SupervisorNamespace", settings("access: [{kind: User, name: ada, role: admin}]"), "", "Unsupported value"},
		{"domain in the name", "SupervisorNamespace", settings("access: [{kind: User, name: ada@x, role: view}]"), "", "put what follows the @ into domain"},
		{"domain before the name", "SupervisorNamespace", settings(`access: [{kind: User, name: 'x\ada', role: view}]`), "", "put what follows the @ into domain"},
		{"Atoll's attribute", "SupervisorNamespace", settings("attributes: {atoll.owner: me}"), "", "do not start with atoll."},
		{"tag without a category", "SupervisorNamespace", settings("tags: [a]"), "", "tags"},
		{"one zone more", "SupervisorNamespace", settings("zones: [a, b]"), settings("zones: [a]"), ""},
		{"one zone less", "SupervisorNamespace", settings("zones: [a]"), settings("zones: [a, b]"), "make another namespace"},
		{"no zones any more", "SupervisorNamespace", settings(""), settings("zones: [a]"), "make another namespace"},
		{"only one of all zones", "SupervisorNamespace", settings("zones: [a]"), settings(""), "make another namespace"},

		{"policy", "StoragePolicy", "spec: {id: a}", "", ""},
		{"another id", "StoragePolicy", "spec: {id: a}", "spec: {id: b}", "cannot be changed"},

		{"class", "VirtualMachineClass", "metadata: {name: c}\nspec: {cpus: 2, memory: 4Gi}", "", ""},
		{"tiny class", "VirtualMachineClass", "metadata: {name: c}\nspec: {cpus: 2, memory: 4}", "", "at least 4Mi"},

		{"template", "NamespaceTemplate", template("cpu: {limit: 2}"), "", ""},
		{"template for nobody", "NamespaceTemplate", "metadata: {name: t}\nspec: {allowedUsers: []}", "", "at least 1 items"},
		{"bad settings", "NamespaceTemplate", template("cpu: {limit: 2, reservation: 3}"), "", "cpu.reservation is above cpu.limit"},
	} {
		t.Run(c.kind+"/"+c.name, func(t *testing.T) {
			got := checkers[c.kind].check(t, c.doc, c.old)
			if c.want == "" && got != "" {
				t.Errorf("refused: %s", got)
			}
			if !strings.Contains(got, c.want) {
				t.Errorf("got %q, want %q in it", got, c.want)
			}
		})
	}
}
