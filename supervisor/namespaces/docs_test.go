package namespaces

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// TestDocs holds docs/namespaces.md against the code: a row for each field of a
// spec, and each name that Kubernetes' side has.
func TestDocs(t *testing.T) {
	b, err := os.ReadFile("../../docs/namespaces.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(b)
	table := doc[strings.Index(doc, "## What maps to what"):strings.Index(doc, "## Who wins")]
	rows := map[string]string{}
	for _, line := range strings.Split(table, "\n") {
		if cells := strings.Split(line, "|"); len(cells) == 5 {
			rows[strings.Trim(strings.TrimSpace(cells[1]), "`")] = line
		}
	}
	fields := map[string]bool{"the name": true}
	for _, typ := range []reflect.Type{reflect.TypeFor[v1alpha1.SupervisorNamespaceSpec](), reflect.TypeFor[v1alpha1.NamespaceSettings]()} {
		for f := range typ.Fields() {
			if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" {
				fields[name] = true
			}
		}
	}
	for name := range fields {
		if rows[name] == "" {
			t.Errorf("the table has no row for spec.%s", name)
		}
	}
	for name := range rows {
		if !fields[name] && name != "spec" && !strings.HasPrefix(name, "--") {
			t.Errorf("the table has a row for %q, which no spec has", name)
		}
	}
	contains := func(row string, want ...string) {
		for _, w := range want {
			if !strings.Contains(rows[row], "`"+w+"`") && !strings.Contains(rows[row], " "+w) {
				t.Errorf("the row of %s lacks %q", row, w)
			}
		}
	}
	for _, c := range counted {
		contains("objectCounts", string(c.name))
	}
	for _, r := range roleRefs {
		contains("access", bindingPrefix+string(r.role), r.clusterRole)
	}
	contains("cpu", "limits.cpu", v1alpha1.AnnotationCPULimit, quotaName("NAME"))
	contains("memory", "limits.memory", v1alpha1.AnnotationMemoryLimit, quotaName("NAME"))
	contains("containerDefaults", limitRangeName("NAME"))
	contains("storagePolicies", storageQuotaName("NAME"), string(storageKey("CLASS")))
	for name := range namespaceAnnotations(&v1alpha1.SupervisorNamespace{}, nil) {
		if !strings.Contains(doc, "`"+name+"`") {
			t.Errorf("docs/namespaces.md lacks the annotation %s", name)
		}
	}
	for _, reason := range reasons(t) {
		if !strings.Contains(doc, "`"+reason+"`") && reason != v1alpha1.ReasonSynced && reason != v1alpha1.ReasonProgressing {
			t.Errorf("docs/namespaces.md lacks the reason %s", reason)
		}
	}
}

// reasons are the constants of api/v1alpha1 whose names begin so.
func reasons(t *testing.T) (values []string) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "../../api/v1alpha1/names.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if v, ok := n.(*ast.ValueSpec); ok && strings.HasPrefix(v.Names[0].Name, "Reason") {
			value, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			values = append(values, value)
		}
		return true
	})
	if len(values) < 20 {
		t.Fatalf("found %d reasons", len(values))
	}
	return values
}
