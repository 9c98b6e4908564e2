package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// A pkg is what go list tells of one.
type pkg struct {
	ImportPath   string
	Dir          string
	ForTest      string
	Deps         []string
	TestGoFiles  []string
	XTestGoFiles []string
}

func (p pkg) hasTests() bool { return len(p.TestGoFiles)+len(p.XTestGoFiles) > 0 }

// listPackages returns this module's packages, and which of them link
// Kubernetes' servers in their tests: to build those with the race detector
// takes longer than all tests together.
func listPackages(ctx context.Context) (all []pkg, heavy map[string]bool, err error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-test", "-json=ImportPath,Dir,ForTest,Deps,TestGoFiles,XTestGoFiles", "./...")
	out, err := cmd.Output()
	if err != nil {
		var e *exec.ExitError
		if errors.As(err, &e) {
			return nil, nil, fmt.Errorf("go list: %s", e.Stderr)
		}
		return nil, nil, err
	}
	heavy = map[string]bool{}
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all, heavy, nil
		} else if err != nil {
			return nil, nil, err
		}
		name, isTest := strings.CutSuffix(p.ImportPath, ".test")
		if isTest && slices.ContainsFunc(p.Deps, linksServers) {
			heavy[name] = true
		}
		if !isTest && p.ForTest == "" {
			all = append(all, p)
		}
	}
}

func linksServers(dep string) bool {
	return strings.HasPrefix(dep, "k8s.io/kubernetes/") || strings.HasPrefix(dep, "k8s.io/apiserver/")
}

func lintSteps(ctx context.Context) ([]step, error) {
	files, err := exec.CommandContext(ctx, "git", "ls-files", "--cached", "--others", "--exclude-standard", "*.go").Output()
	if err != nil {
		return nil, fmt.Errorf("git ls-files: %w", err)
	}
	unformatted := func(output string) string {
		if output = strings.TrimSpace(output); output != "" {
			return "not formatted, run `make fmt`:\n" + output
		}
		return ""
	}
	// The linter's cache keeps absolute paths: one that checkouts share reports
	// what a //nolint excuses, once a checkout that filled it is gone.
	cache, err := filepath.Abs("build/lint-cache")
	if err != nil {
		return nil, err
	}
	return []step{
		{name: "gofmt", argv: append([]string{"gofmt", "-s", "-l"}, existing(files)...), fail: unformatted},
		{name: "go vet", argv: []string{"go", "vet", "./..."}},
		{
			// Its lock is the machine's, for caches that are shared: this one is not.
			name: "golangci-lint", argv: []string{"bin/golangci-lint", "run", "--timeout=1h", "--allow-parallel-runners"},
			env: []string{"GOLANGCI_LINT_CACHE=" + cache}, background: true,
		},
	}, nil
}

// existing leaves out files that are deleted but not yet in a commit.
func existing(list []byte) []string {
	var files []string
	for _, f := range strings.Fields(string(list)) {
		if m, _ := filepath.Glob(f); len(m) == 1 {
			files = append(files, f)
		}
	}
	return files
}

// imagesPackage packs megabytes of images, for which the race detector takes
// ten times as long and more. It has no goroutine of its own; what it calls
// meets the detector in its own tests.
const imagesPackage = "/cmd/mkimages"

// unitSteps are all tests that need no VM.
func unitSteps(ctx context.Context) ([]step, error) {
	all, heavy, err := listPackages(ctx)
	if err != nil {
		return nil, err
	}
	ignore := map[string]bool{}
	var raced, plain []string
	for _, p := range all {
		if !p.hasTests() {
			continue
		}
		names, err := longTests(p)
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			ignore[key(p.ImportPath, n)] = true
		}
		switch {
		case strings.HasSuffix(p.ImportPath, "/e2e"): // a suite of its own
		case heavy[p.ImportPath] || strings.HasSuffix(p.ImportPath, imagesPackage):
			plain = append(plain, p.ImportPath)
		default:
			raced = append(raced, p.ImportPath)
		}
	}
	race := []string{"-race"}
	if _, err := exec.LookPath("gcc"); err != nil {
		fmt.Println("no C compiler: without the race detector")
		race = nil
	}
	return []step{
		{test: true, ignore: ignore, argv: goTest(append([]string{"-short"}, race...), raced)},
		{test: true, ignore: ignore, argv: goTest([]string{"-short"}, plain)},
	}, nil
}

// vmSteps are the long tests, most of which boot VMs, a step a package. Most of
// them wait more than they compute: a guest boots on one CPU, an API server
// answers.
func vmSteps(ctx context.Context) ([]step, error) {
	all, _, err := listPackages(ctx)
	if err != nil {
		return nil, err
	}
	var steps []step
	for _, p := range all {
		if strings.HasSuffix(p.ImportPath, "/e2e") {
			continue
		}
		names, err := longTests(p)
		if err != nil {
			return nil, err
		}
		if len(names) > 0 {
			steps = append(steps, step{test: true, argv: goTest([]string{"-timeout=10m", "-run", "^(" + strings.Join(names, "|") + ")$"}, []string{p.ImportPath})})
		}
	}
	return steps, nil
}

// e2eSteps run three scripts at a time: with two, the cluster and their VMs took
// 36 % of two CPUs.
func e2eSteps(context.Context) ([]step, error) {
	return []step{{test: true, argv: goTest([]string{"-timeout=24m", "-parallel=3"}, []string{"./e2e"})}}, nil
}

// goTest leaves vet out: the lint suite has vetted all packages.
func goTest(flags, pkgs []string) []string {
	argv := append([]string{"go", "test", "-json", "-count=1", "-vet=off"}, flags...)
	return append(argv, pkgs...)
}

// longTests returns the tests that do less, or nothing, with -short: those in
// files *_vm_test.go, and those that ask testing.Short themselves.
func longTests(p pkg) ([]string, error) {
	var names []string
	for _, file := range slices.Concat(p.TestGoFiles, p.XTestGoFiles) {
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, file), nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Recv != nil || !strings.HasPrefix(fn.Name.Name, "Test") || fn.Name.Name == "TestMain" {
				continue
			}
			if strings.HasSuffix(file, "_vm_test.go") || asksShort(fn) {
				names = append(names, fn.Name.Name)
			}
		}
	}
	return names, nil
}

// asksShort reports whether a function calls testing.Short.
func asksShort(fn *ast.FuncDecl) bool {
	found := false
	ast.Inspect(fn, func(n ast.Node) bool {
		if sel, ok := n.(*ast.SelectorExpr); ok && sel.Sel.Name == "Short" {
			x, ok := sel.X.(*ast.Ident)
			found = found || ok && x.Name == "testing"
		}
		return !found
	})
	return found
}
