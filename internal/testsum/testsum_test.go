package main

import (
	"context"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestCounter(t *testing.T) {
	const p = `"Package":"github.com/openatoll/atoll/x"`
	c := newCounter(map[string]bool{"x.TestVM": true})
	for line := range strings.Lines(`
{"Action":"run",` + p + `,"Test":"TestA"}
{"Action":"pass",` + p + `,"Test":"TestA"}
{"Action":"run",` + p + `,"Test":"TestB"}
{"Action":"run",` + p + `,"Test":"TestB/one"}
{"Action":"run",` + p + `,"Test":"TestB/two"}
{"Action":"pass",` + p + `,"Test":"TestB/one"}
{"Action":"output",` + p + `,"Test":"TestB/two","Output":"    x_test.go:1: wrong\n"}
{"Action":"fail",` + p + `,"Test":"TestB/two"}
{"Action":"output",` + p + `,"Test":"TestB","Output":"--- FAIL: TestB (0.00s)\n"}
{"Action":"fail",` + p + `,"Test":"TestB"}
{"Action":"output",` + p + `,"Test":"TestS","Output":"    x_test.go:9: needs a unicorn\n"}
{"Action":"skip",` + p + `,"Test":"TestS"}
{"Action":"skip",` + p + `,"Test":"TestVM/big"}
{"Action":"skip",` + p + `,"Test":"TestVM"}
{"Action":"fail",` + p + `}
not json
{"Action":"build-output","ImportPath":"y","Output":"y.go:1: no\n"}
{"Action":"fail","Package":"github.com/openatoll/atoll/y"}
`) {
		c.line([]byte(line))
	}
	if c.passed != 2 {
		t.Errorf("passed %d, want 2", c.passed)
	}
	if want := []string{"x.TestB/two", "y"}; !reflect.DeepEqual(c.result.failed, want) {
		t.Errorf("failed %q, want %q", c.result.failed, want)
	}
	if want := []string{"x.TestS: x_test.go:9: needs a unicorn"}; !reflect.DeepEqual(c.skipped, want) {
		t.Errorf("skipped %q, want %q", c.skipped, want)
	}
}

func TestChoose(t *testing.T) {
	if _, err := choose([]string{"nonsense"}); err == nil {
		t.Error("a suite that is not known")
	}
	if _, err := choose(nil); err == nil {
		t.Error("no suite")
	}
	if s, err := choose([]string{"e2e", "unit"}); err != nil || len(s) != 2 || s[0].name != "e2e" {
		t.Errorf("choose = %v, %v", s, err)
	}
}

func TestLongTests(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{
		"a_vm_test.go": "package a\nfunc TestMain(m *testing.M) {}\nfunc TestBoot(t *testing.T) {}\nfunc boot() {}\n",
		"a_test.go":    "package a\nfunc TestQuick(t *testing.T) {}\nfunc TestLong(t *testing.T) { if testing.Short() { t.Skip() } }\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := longTests(pkg{Dir: dir, TestGoFiles: []string{"a_vm_test.go", "a_test.go"}})
	if want := []string{"TestBoot", "TestLong"}; err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
}

// TestBackground: a step of the background runs while another suite does: each
// blocks until its other end of a FIFO is opened.
func TestBackground(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := syscall.Mkfifo("ground", 0o600); err != nil {
		t.Fatal(err)
	}
	shell := func(command string) step { return step{name: command, argv: []string{"sh", "-c", command}} }
	read, write := shell("cat < ground"), shell("echo > ground")
	read.background = true
	of := func(name string, steps ...step) suite {
		return suite{name, time.Minute, func(context.Context) ([]step, error) { return steps, nil }}
	}
	first := of("first", shell("true"), read).start(t.Context(), true)
	second := of("second", write).start(t.Context(), false)
	if r := <-first; r.passed != 2 || len(r.failed) > 0 {
		t.Errorf("first: %d passed, failed %q", r.passed, r.failed)
	}
	if r := <-second; r.passed != 1 || len(r.failed) > 0 {
		t.Errorf("second: %d passed, failed %q", r.passed, r.failed)
	}
	failing := of("third", shell("exit 3"), shell("true")).start(t.Context(), false)
	if r := <-failing; r.passed != 1 || !reflect.DeepEqual(r.failed, []string{"exit 3"}) {
		t.Errorf("third: %d passed, failed %q", r.passed, r.failed)
	}
}
