package failpoint

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const root = "../.."

// declared reads the constants of points.go: name in Go to the point's name.
func declared(t *testing.T) map[string]Point {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), "points.go", nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	consts := map[string]Point{}
	for _, d := range f.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.CONST {
			continue
		}
		for _, s := range g.Specs {
			v := s.(*ast.ValueSpec)
			lit, ok := v.Values[0].(*ast.BasicLit)
			if !ok {
				t.Fatalf("constant %s is not a string", v.Names[0])
			}
			name, err := strconv.Unquote(lit.Value)
			if err != nil {
				t.Fatal(err)
			}
			consts[v.Names[0].Name] = Point(name)
		}
	}
	return consts
}

// sites finds the calls of Hit and Err outside of this package: the constant
// that is passed, or what is passed instead of one, to the files.
func sites(t *testing.T) map[string][]string {
	t.Helper()
	found := map[string][]string{}
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() && slices.Contains([]string{".git", "bin", "build", "tools", "testdata", "failpoint"}, e.Name()) {
			return fs.SkipDir
		}
		if e.IsDir() || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) != 1 {
				return true
			}
			if pkg, name := selector(call.Fun); pkg != "failpoint" || name != "Hit" && name != "Err" {
				return true
			}
			at := fset.Position(call.Pos()).String()
			if pkg, name := selector(call.Args[0]); pkg == "failpoint" {
				found[name] = append(found[name], at)
			} else {
				t.Errorf("%s: a point is named by a constant of package failpoint, so that the matrix knows it", at)
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func selector(e ast.Expr) (pkg, name string) {
	s, ok := e.(*ast.SelectorExpr)
	if !ok {
		return "", ""
	}
	x, ok := s.X.(*ast.Ident)
	if !ok {
		return "", ""
	}
	return x.Name, s.Sel.Name
}

func TestEveryPointHasOneSite(t *testing.T) {
	consts, sites := declared(t), sites(t)
	names := map[Point]string{}
	for name, point := range consts {
		if other := names[point]; other != "" {
			t.Errorf("%s and %s are both %q", name, other, point)
		}
		names[point] = name
		if !slices.Contains(All, point) && !slices.Contains(Volumes, point) {
			t.Errorf("%s (%s) is missing in All and Volumes: no test would reach it", name, point)
		}
		if n := len(sites[name]); n != 1 {
			t.Errorf("%s (%s) has %d sites, must have one: %v", name, point, n, sites[name])
		}
	}
	if n := len(All) + len(Volumes); n != len(consts) {
		t.Errorf("All and Volumes have %d points, %d are declared", n, len(consts))
	}
	for name := range sites {
		if _, ok := consts[name]; !ok {
			t.Errorf("%s is hit at %v and not declared", name, sites[name])
		}
	}
}
