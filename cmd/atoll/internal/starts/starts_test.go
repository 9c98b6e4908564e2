package starts

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/openatoll/atoll/api/v1alpha1"
)

var update = flag.Bool("update", false, "write the golden files")

func phase(name string, from, took int64) v1alpha1.StartPhase {
	return v1alpha1.StartPhase{Name: name, From: from, Took: took}
}

var begun = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func examples() []Start {
	return []Start{
		{"default", "web-7d4b9c-x2x4z", "n1", v1alpha1.PodStart{Begun: begun, Total: 2400, Prepared: true, Phases: []v1alpha1.StartPhase{
			phase("queue", 0, 100), phase("network", 100, 120), phase("image", 100, 20), phase("vm", 100, 400), phase("agent", 500, 1500), phase("container", 2100, 300)}}},
		{"prod", "db-0", "node-two", v1alpha1.PodStart{Begun: begun.Add(time.Minute), Total: 61000, Phases: []v1alpha1.StartPhase{
			phase("network", 0, 30), phase("vm", 30, 90), phase("agent", 120, 1800), phase("image", 2000, 58000), phase("container", 60200, 800)}}},
		{"prod", "quick", "n1", v1alpha1.PodStart{Begun: begun.Add(-time.Hour)}},
		{"prod", "odd", "n1", v1alpha1.PodStart{Begun: begun.Add(-2 * time.Hour), Total: 10, Phases: []v1alpha1.StartPhase{phase("agent", -50, 55), phase("of another version", 0, 10), phase("vm", 8, 1000)}}},
	}
}

func TestTable(t *testing.T) {
	var all strings.Builder
	for _, style := range []Style{{Width: 80, ASCII: true}, {Width: 100, Namespaces: true}, {Width: 160, ASCII: true}, {Width: 20, ASCII: true}} {
		var b strings.Builder
		if err := Table(&b, Last(examples(), 0), style); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(b.String()) {
			if n := utf8.RuneCountInString(strings.TrimSpace(line)); n > max(style.Width, 60) && !strings.HasPrefix(line, "Each bar") {
				t.Errorf("a line of %d for a width of %d: %s", n, style.Width, line)
			}
			if style.ASCII && strings.ContainsFunc(line, func(r rune) bool { return r > 127 }) {
				t.Errorf("not ASCII: %s", line)
			}
		}
		all.WriteString(b.String() + "\n")
	}
	file := filepath.Join("testdata", "table.golden")
	if *update {
		if err := os.WriteFile(file, []byte(all.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if all.String() != string(want) {
		t.Errorf("the table differs from %s (-update writes it):\n%s", file, &all)
	}
}

func TestBar(t *testing.T) {
	for _, tc := range []struct {
		total  int64
		phases []v1alpha1.StartPhase
		want   string
	}{
		{100, nil, ".........."},
		{0, []v1alpha1.StartPhase{phase("vm", 0, 0)}, ".........."},
		{100, []v1alpha1.StartPhase{phase("queue", 0, 20), phase("agent", 20, 70), phase("container", 95, 5)}, "qqaaaaaaac"},
		{100, []v1alpha1.StartPhase{phase("image", 0, 100), phase("vm", 0, 50)}, "vvvvviiiii"},
		{100, []v1alpha1.StartPhase{phase("network", 0, 3), phase("vm", 3, 7)}, "v........."},
		{3, []v1alpha1.StartPhase{phase("queue", 0, 1), phase("vm", 1, 1), phase("agent", 2, 1)}, "qqqvvvvaaa"},
		{100, []v1alpha1.StartPhase{phase("agent", -1000, 5000)}, "aaaaaaaaaa"},
	} {
		if got := Bar(v1alpha1.PodStart{Total: tc.total, Phases: tc.phases}, 10, '.'); got != tc.want {
			t.Errorf("%v: %s, want %s", tc.phases, got, tc.want)
		}
	}
}

func TestLastAndOf(t *testing.T) {
	got := Last(examples(), 2)
	if len(got) != 2 || got[0].Pod != "db-0" || got[1].Pod != "web-7d4b9c-x2x4z" {
		t.Errorf("the last two are %+v", got)
	}
	for value, want := range map[string]bool{
		`{"begun":"2026-01-02T03:04:05.678Z","total":12,"prepared":true,"phases":[{"name":"vm","from":1,"took":2}]}`: true,
		"": false, "{}": false, "[]": false, `{"begun":"2026-01-02T03:04:05Z","total":-1}`: false,
	} {
		s, ok := Of(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", Annotations: map[string]string{v1alpha1.StartAnnotation: value}}})
		if ok != want || ok && (s.Pod != "p" || s.took("vm") != 2 || s.took("agent") != -1) {
			t.Errorf("%q: %+v %v", value, s, ok)
		}
	}
}
