package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// secretVariables are of the environment of scripts, which -v prints, as scripts
// may.
var secretVariables = []string{"GOVC_PASSWORD"}

// run is testscript.Run with the values of secretVariables masked in its logs.
func run(t *testing.T, p testscript.Params) {
	t.Helper()
	var pairs []string
	for _, name := range secretVariables {
		if secret := os.Getenv(name); secret != "" {
			pairs = append(pairs, secret, "[masked]")
		}
	}
	testscript.RunT(masked{t, strings.NewReplacer(pairs...)}, p)
}

// A masked is a T that logs no secrets.
type masked struct {
	*testing.T
	secrets *strings.Replacer
}

func (m masked) Run(name string, f func(testscript.T)) {
	m.T.Run(name, func(t *testing.T) { f(masked{t, m.secrets}) })
}

func (m masked) Verbose() bool { return testing.Verbose() }

func (m masked) Log(args ...any)   { m.T.Helper(); m.T.Log(m.mask(args)) }
func (m masked) Fatal(args ...any) { m.T.Helper(); m.T.Fatal(m.mask(args)) }
func (m masked) Skip(args ...any)  { m.T.Helper(); m.T.Skip(m.mask(args)) }

func (m masked) mask(args []any) string {
	return m.secrets.Replace(strings.TrimSuffix(fmt.Sprintln(args...), "\n"))
}

// TestSecretsAreMasked in what a script prints and in its environment.
func TestSecretsAreMasked(t *testing.T) {
	const secret = "a-secret-of-the-tests"
	if os.Getenv("GOVC_PASSWORD") != secret {
		// The log of a test is to be read: in a process of its own.
		t.Setenv("GOVC_PASSWORD", secret)
		b, err := exec.Command("/proc/self/exe", "-test.run=^TestSecretsAreMasked$", "-test.v", "-test.short").CombinedOutput()
		out := string(b)
		if err != nil || strings.Contains(out, secret) || !strings.Contains(out, "GOVC_PASSWORD=[masked]") || !strings.Contains(out, "it is [masked].") {
			t.Errorf("%v: %s", err, out)
		}
		return
	}
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/s.txt", []byte("exec echo it is $GOVC_PASSWORD.\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, testscript.Params{Dir: dir, Setup: func(env *testscript.Env) error {
		env.Setenv("GOVC_PASSWORD", secret)
		return nil
	}})
}
