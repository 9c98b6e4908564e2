package deptest

import (
	"bufio"
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	module = "github.com/openatoll/atoll"
	root   = "../.."
	// vcenter is the embedded vCenter's package.
	vcenter = "vmpod/vsphere/vcsim"
)

// A rule is a row of the table: packages that match may import allowed, the
// standard library and other modules.
type rule struct {
	packages string
	allowed  []string
}

// match tells whether a pattern ("cri/..." or "vmpod") covers a package, and
// how well: the longest pattern counts.
func match(pattern, pkg string) (int, bool) {
	prefix, tree := strings.CutSuffix(pattern, "/...")
	if pkg == prefix || tree && strings.HasPrefix(pkg, prefix+"/") {
		n := 2 * len(prefix)
		if !tree {
			n++
		}
		return n, true
	}
	return 0, false
}

// parseTable reads the rows between the markers of docs/architecture.md.
func parseTable(text string) ([]rule, error) {
	_, rest, ok := strings.Cut(text, "<!-- imports:begin -->")
	table, _, ok2 := strings.Cut(rest, "<!-- imports:end -->")
	if !ok || !ok2 {
		return nil, fmt.Errorf("the markers imports:begin and imports:end are missing")
	}
	quoted := regexp.MustCompile("`([^`]+)`")
	var rules []rule
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) < 4 {
			continue
		}
		var allowed []string
		for _, m := range quoted.FindAllStringSubmatch(cells[2], -1) {
			allowed = append(allowed, m[1])
		}
		for _, m := range quoted.FindAllStringSubmatch(cells[1], -1) {
			rules = append(rules, rule{packages: m[1], allowed: allowed})
		}
	}
	return rules, nil
}

func ruleFor(rules []rule, pkg string) (rule, bool) {
	best, found, length := rule{}, false, -1
	for _, r := range rules {
		if n, ok := match(r.packages, pkg); ok && n > length {
			best, found, length = r, true, n
		}
	}
	return best, found
}

func (r rule) allows(pkg string) bool {
	if _, self := match(r.packages, pkg); self {
		return true
	}
	return slices.ContainsFunc(r.allowed, func(p string) bool { _, ok := match(p, pkg); return ok })
}

// A source is one Go file of this module.
type source struct {
	path      string // slash-separated, from the module's root
	generated bool
	lines     int
	imports   []string // of this module, without its path
}

func (s source) pkg() string { return path.Dir(s.path) }

func sources(t *testing.T) []source {
	t.Helper()
	skip := []string{".git", "bin", "build", "tools", "testdata"}
	var all []source
	err := filepath.WalkDir(root, func(file string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() {
			if slices.Contains(skip, e.Name()) {
				return fs.SkipDir
			}
			return nil
		}
		if filepath.Ext(file) != ".go" {
			return nil
		}
		s, err := readSource(file)
		all = append(all, s)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func readSource(file string) (source, error) {
	rel, err := filepath.Rel(root, file)
	if err != nil {
		return source{}, err
	}
	content, err := os.ReadFile(file)
	if err != nil {
		return source{}, err
	}
	f, err := parser.ParseFile(token.NewFileSet(), file, content, parser.ImportsOnly|parser.ParseComments)
	if err != nil {
		return source{}, err
	}
	s := source{path: filepath.ToSlash(rel), generated: ast.IsGenerated(f), lines: bytes.Count(content, []byte("\n"))}
	for _, i := range f.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		if err != nil {
			return s, err
		}
		if own, ok := strings.CutPrefix(p, module+"/"); ok {
			s.imports = append(s.imports, own)
		}
	}
	return s, nil
}

// TestImports holds every import of this module against the table.
func TestImports(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join(root, "docs/architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	rules, err := parseTable(string(doc))
	if err != nil {
		t.Fatalf("docs/architecture.md: %v", err)
	}
	used := map[string]bool{}
	for _, s := range sources(t) {
		r, ok := ruleFor(rules, s.pkg())
		if !ok {
			t.Errorf("%s: package %s is in no row of the table in docs/architecture.md", s.path, s.pkg())
			continue
		}
		used[r.packages] = true
		if strings.HasSuffix(s.path, "_vm_test.go") {
			continue // puts the real parts together, as cmd does
		}
		for _, i := range s.imports {
			if i == vcenter && strings.HasSuffix(s.path, "_test.go") {
				continue // any test may run against a vCenter
			}
			if !r.allows(i) {
				t.Errorf("%s imports %s; %s may import only %s", s.path, i, r.packages, strings.Join(r.allowed, " "))
			}
		}
	}
	for _, r := range rules {
		if !used[r.packages] {
			t.Errorf("docs/architecture.md: the row of %s is about no package", r.packages)
		}
	}
}

// forbidden is what a program must not link, and why.
var forbidden = []struct{ program, dep, why string }{
	{"cmd/podinit", "k8s.io/kubernetes", "it is in the memory of every pod"},
	{"cmd/podinit", "k8s.io/client-go", "it is in the memory of every pod"},
	{"cmd/podinit", "github.com/vmware/govmomi", "it is in the memory of every pod"},
	{"cmd/podinit", "github.com/containerd/containerd/v2/client", "it is in the memory of every pod"},
	{"cmd/kubectl-atoll", "k8s.io/kubernetes", "users take it to machines of their own"},
	{"cmd/kubectl-atoll", "github.com/vmware/govmomi", "users take it to machines of their own"},
	{"cri", "k8s.io/kubernetes", "any CRI client can use it"},
	{"cri", "github.com/vmware/govmomi", "only what talks to a vCenter needs it"},
	{"storage/csi/controllers", "k8s.io/kubernetes", "a CSI driver knows nothing of the kubelet that uses it"},
	{"vmpod", "k8s.io/kubernetes", "drivers know nothing of the kubelet"},
	{"vmpod/qemu", "github.com/vmware/govmomi", "a KVM host has no vCenter"},
}

// TestLinks looks at everything that a program links, through other modules.
func TestLinks(t *testing.T) {
	deps := map[string][]string{}
	for _, f := range forbidden {
		if deps[f.program] == nil {
			cmd := exec.Command("go", "list", "-deps", "./"+f.program)
			cmd.Dir = root
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("go list -deps ./%s: %v", f.program, err)
			}
			for sc := bufio.NewScanner(bytes.NewReader(out)); sc.Scan(); {
				deps[f.program] = append(deps[f.program], sc.Text())
			}
		}
		for _, d := range deps[f.program] {
			if _, bad := match(f.dep+"/...", d); bad {
				t.Errorf("%s links %s; it must not, because %s", f.program, d, f.why)
			}
		}
	}
}

// TestNames refuses names that say nothing, and files that hold two things.
func TestNames(t *testing.T) {
	vague := regexp.MustCompile(`(^|[/_])(utils?|common|helpers?|misc)([/_.]|$)`)
	for _, s := range sources(t) {
		if vague.MatchString(s.path) {
			t.Errorf("%s: name it after what it is for", s.path)
		}
		if s.lines > 600 && !s.generated && !strings.HasSuffix(s.path, "_test.go") {
			t.Errorf("%s has %d lines; past 600 a file usually holds two things", s.path, s.lines)
		}
	}
}

// TestTheTest shows that the rules can fail.
func TestTheTest(t *testing.T) {
	rules, err := parseTable("<!-- imports:begin -->\n| a | b | c |\n|---|---|---|\n" +
		"| `vmpod` | `api/...` | the contract |\n| `vmpod/...` | `vmpod`, `api/...` | drivers |\n| `cmd/...` | `vmpod/...` | |\n<!-- imports:end -->")
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		pkg, imports string
		want         bool
	}{
		{"vmpod", "api/v1alpha1", true},
		{"vmpod", "vmpod/qemu", false},
		{"vmpod/qemu", "vmpod", true},
		{"vmpod/qemu", "vmpod/other", true},
		{"vmpod/qemu", "vmpodx", false},
		{"cmd/atoll", "vmpod/qemu", true},
		{"cmd/atoll", "cri", false},
	} {
		r, ok := ruleFor(rules, tc.pkg)
		if got := ok && r.allows(tc.imports); got != tc.want {
			t.Errorf("%s may import %s: %v, want %v", tc.pkg, tc.imports, got, tc.want)
		}
	}
	if _, ok := ruleFor(rules, "cri"); ok {
		t.Error("a package without a row has one")
	}
}
