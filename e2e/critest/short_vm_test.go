package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// TestShort runs the specs of -short on the runtime that was built, each as a
// test of its own. `make critest` runs all.
func TestShort(t *testing.T) {
	if testing.Short() {
		t.Skip("boots VMs")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes network namespaces and taps")
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, "bin", "spherelet")); err != nil {
		t.Fatalf("%v: run `make build` first", err)
	}
	dir := t.TempDir()
	out, program := filepath.Join(dir, "short.json"), filepath.Join(dir, "critest")
	if said, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, said)
	}
	run := exec.CommandContext(t.Context(), program, "-short", "-out", out, "-log", filepath.Join(dir, "spherelet.log"))
	run.Dir = root
	run.Cancel = func() error { return run.Process.Signal(os.Interrupt) }
	run.WaitDelay = 2 * time.Minute // it takes back what it made
	said, err := run.CombinedOutput()
	text, rerr := os.ReadFile(out)
	if rerr != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	var r result
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	for _, s := range r.Failed {
		t.Run(s.Name, func(t *testing.T) { t.Error(s.Reason) })
	}
	for _, s := range r.Passed {
		t.Run(s.Name, func(*testing.T) {})
	}
	if err != nil || len(r.Passed) < len(shortSpecs) {
		t.Errorf("%d passed, at least %d should; %v\n%s", len(r.Passed), len(shortSpecs), err, said)
	}
}
