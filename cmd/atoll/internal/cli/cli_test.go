package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/cmd/atoll/internal/cluster"
)

// run runs a command line and returns what it printed.
func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	root := newRoot()
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs(args)
	err := root.ExecuteContext(t.Context())
	return out.String(), err
}

func TestVersion(t *testing.T) {
	out, err := run(t, "version", "-o", "json")
	if err != nil || !strings.Contains(out, `"kubernetes": "v1.36`) {
		t.Errorf("%s, %v", out, err)
	}
	var usage usageError
	if _, err := run(t, "version", "-o", "xml"); !errors.As(err, &usage) {
		t.Errorf("-o xml: %v", err)
	}
	if _, err := run(t, "version", "--nonsense"); !errors.As(err, &usage) {
		t.Errorf("--nonsense: %v", err)
	}
}

func TestCommandsWithoutACluster(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "none")
	for _, args := range [][]string{{"status"}, {"enter", "--", "true"}, {"backup", "f"}, {"logs"}} {
		_, err := run(t, append([]string{"--data-dir", dir}, args...)...)
		if err == nil || errors.Is(err, errFound) {
			t.Errorf("%v: %v", args, err)
		}
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("a command that only looks made the data directory")
	}
}

func TestLeftoversOfNothing(t *testing.T) {
	out, err := run(t, "--data-dir", filepath.Join(t.TempDir(), "none"), "leftovers")
	if err != nil || out != "nothing is left\n" {
		t.Errorf("%q, %v", out, err)
	}
}

func TestManAndCompletion(t *testing.T) {
	dir := t.TempDir()
	if _, err := run(t, "man", dir); err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(dir, "atoll-up.8"))
	if err != nil || !strings.Contains(string(page), "isolated") {
		t.Errorf("%.80s, %v", page, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "atoll-supervisor.8")); err == nil {
		t.Error("the hidden command has a page")
	}
	if _, err := run(t, "completion", "bash"); err != nil {
		t.Error(err)
	}
}

func TestErrorsReadAsSentences(t *testing.T) {
	err := fmt.Errorf("there is no cluster in /x: %w", errdefs.ErrNotFound)
	if got := sentence(err); got != "there is no cluster in /x" {
		t.Errorf("%q", got)
	}
	var out bytes.Buffer
	printError(&out, &cluster.ComponentError{Component: "spherelet", Log: "/l", Lines: []string{"level=ERROR no kernel"}, Err: io.EOF}, false)
	for _, want := range []string{"atoll: spherelet: EOF\n", "  level=ERROR no kernel\n", "/l", "atoll check"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in:\n%s", want, out.String())
		}
	}
	out.Reset()
	printError(&out, context.Canceled, true)
	if !strings.Contains(out.String(), "interrupted") {
		t.Errorf("interrupted: %q", out.String())
	}
}

func TestGetDisksWithoutACluster(t *testing.T) {
	var usage usageError
	if _, err := run(t, "get", "disks", "-o", "xml"); !errors.As(err, &usage) || !strings.Contains(err.Error(), "wide") {
		t.Errorf("-o xml: %v", err)
	}
	if _, err := run(t, "--data-dir", filepath.Join(t.TempDir(), "none"), "get", "disks"); err == nil {
		t.Error("disks of no cluster were shown")
	}
}
