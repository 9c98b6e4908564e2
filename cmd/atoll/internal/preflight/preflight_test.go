package preflight

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRunLeavesOutWhatCannotBeTold(t *testing.T) {
	ran := map[string]bool{}
	check := func(name string, f Finding, needs ...string) Check {
		return Check{Name: name, Needs: needs, Run: func(context.Context) Finding { ran[name] = true; return f }}
	}
	findings := Run(t.Context(), []Check{
		check("a", fail("do x", "no")), check("b", ok("yes")), check("c", ok("yes"), "a"), check("d", ok("yes"), "c"),
	})
	if ran["c"] || ran["d"] || !ran["b"] || len(findings) != 2 {
		t.Errorf("ran %v, findings %v", ran, findings)
	}
	err := Err(findings)
	var e *Error
	if !errors.As(err, &e) || len(e.Failures) != 1 || !strings.Contains(err.Error(), "cure: do x") {
		t.Errorf("Err = %v", err)
	}
	if Err(findings[1:]) != nil {
		t.Error("an error without a failure")
	}
}

func write(t *testing.T, content string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestMemory(t *testing.T) {
	for content, want := range map[string]Level{
		"MemTotal: 1 kB\nMemAvailable:   8000000 kB\n": OK,
		"MemAvailable:   2000000 kB\n":                 Warn,
		"MemAvailable:    500000 kB\n":                 Fail,
		"":                                             Warn,
	} {
		if f := memory(write(t, content)); f.Level != want || (want != OK && f.Cure == "") {
			t.Errorf("%q: %+v, want %s", content, f, want)
		}
	}
}

func TestCgroups(t *testing.T) {
	v2 := t.TempDir()
	if err := os.WriteFile(filepath.Join(v2, "cgroup.controllers"), []byte("cpuset cpu io memory pids\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if f := cgroups(v2); f.Level != OK {
		t.Errorf("v2: %+v", f)
	}
	if f := cgroups(t.TempDir()); f.Level != Warn || !strings.Contains(f.Detail, "memory") {
		t.Errorf("none: %+v", f)
	}
}

func TestHostFailures(t *testing.T) {
	h := Host{
		DataDir: "/proc/nowhere", Spherelet: "/nowhere/spherelet", Guest: "/nowhere/guest",
		NodeName:     func() (string, error) { return "", errors.New("no name") },
		CheckDataDir: func() error { return errors.New("version 99") },
		Ports:        func() []error { return []error{errors.New("port 6443 in use by nginx")} },
		KVM:          func(context.Context) (bool, string) { return false, "it emulates" },
	}
	for name, tc := range map[string]struct {
		run  func(context.Context) Finding
		want Level
		text string
	}{
		"name":      {h.nodeName, Fail, "no name"},
		"spherelet": {h.spherelet, Fail, "/nowhere/spherelet"},
		"guest":     {h.guest, Fail, "/nowhere/guest"},
		"images":    {h.images, Warn, "atoll.local"},
		"data":      {h.dataDir, Fail, "version 99"},
		"ports":     {h.ports, Fail, "nginx"},
		"kvm":       {h.kvm, Warn, "it emulates"},
	} {
		f := tc.run(t.Context())
		if f.Level != tc.want || !strings.Contains(f.Detail, tc.text) || f.Cure == "" {
			t.Errorf("%s: %+v, want %s with %q and a cure", name, f, tc.want, tc.text)
		}
	}
}

// The real probes, which only a host that cannot run Atoll fails.
func TestProbesOfThisHost(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("taps and tables need root")
	}
	for name, run := range map[string]func(context.Context) Finding{"tun": tun, "nftables": nftables, "qemu": qemu, "platform": platform} {
		if f := run(t.Context()); f.Level != OK {
			t.Errorf("%s: %+v", name, f)
		}
	}
}
