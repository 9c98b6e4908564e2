package cli

import (
	"bytes"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/openatoll/atoll/cmd/atoll/internal/cluster"
)

func TestStatusShowsNamespaces(t *testing.T) {
	cores, used := resource.MustParse("4"), resource.MustParse("500m")
	st := cluster.Status{Namespaces: []cluster.Namespace{
		{Name: "shop", Synced: true, CPU: cluster.Share{Used: &used, Limit: &cores}, Pools: []string{"resgroup-1", "resgroup-2"}},
		{Name: "till", Reason: "NoPermission"},
		{Name: "free", Synced: true, CPU: cluster.Share{Used: &used}},
	}}
	var out bytes.Buffer
	if err := statusTable(&out, st); err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(out.String()) {
		got = append(got, strings.Join(strings.Fields(line), " "))
	}
	text := strings.Join(got, "\n")
	for _, want := range []string{
		"NAMESPACE SYNCED CPU MEMORY POOLS",
		"shop yes 500m of 4 - resgroup-1,resgroup-2",
		"till no (NoPermission) - - -",
		"free yes 500m - -",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in:\n%s", want, out.String())
		}
	}
	out.Reset()
	if err := statusTable(&out, cluster.Status{}); err != nil || strings.Contains(out.String(), "NAMESPACE") {
		t.Errorf("a table of no namespaces (%v):\n%s", err, out.String())
	}
}
