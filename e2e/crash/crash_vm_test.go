package main

import (
	"context"
	"os"
	"path/filepath"
	"testing"
)

func TestMain(m *testing.M) {
	if os.Getenv(insideEnv) != "" {
		main() // this binary, once more, inside the cluster's network namespace
		return
	}
	os.Exit(m.Run())
}

// TestTwentyKills is the short form of `make crash`. How soon everything is
// back is for that to judge, on a machine that does nothing else.
func TestTwentyKills(t *testing.T) {
	if testing.Short() {
		t.Skip("boots pod VMs")
	}
	dir := t.TempDir()
	o, err := parseOptions([]string{"-kills=20", "-within=1m", "-timeout=8m30s", "-bin=../../bin", "-out=" + filepath.Join(dir, "crash.json"), "-keep=" + filepath.Join(dir, "logs")})
	if err != nil {
		t.Fatal(err)
	}
	r, err := run(context.Background(), o)
	if err == nil {
		t.Log(r.summary())
		err = r.verdict()
	}
	if err != nil {
		log, _ := os.ReadFile(filepath.Join(dir, "logs", "spherelet.log"))
		t.Fatalf("%v\nrepeat with: go run ./e2e/crash -kills 20 -seed %d\nspherelet's log ends:\n%s", err, o.Seed, log[max(0, len(log)-8000):])
	}
}
