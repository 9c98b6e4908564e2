// Package e2e drives a real cluster as its users do: atoll, kubectl, crictl.
//
// Each script in testdata reads as a session and runs in a Kubernetes
// namespace of its own; those in testdata/alone kill the node's daemon. All of
// them share one isolated cluster: the test binary brings it up, runs itself
// once more inside the cluster's network namespace, and takes the cluster down
// again; what is left behind fails the run.
//
//	go test ./e2e                    everything
//	go test ./e2e -run 'Scripts/exec' one script (testdata/exec.txt)
//	ATOLL_E2E_KEEP=1 go test ./e2e   leave the cluster for a look
//	ATOLL_IDLE=10m go test ./e2e -run Scripts/^idle
//	                                 streams that are silent for so long
package e2e

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// defaultIdle is how long testdata/idle.txt keeps streams silent unless
// ATOLL_IDLE says otherwise: longer than the minute that HTTP servers and
// proxies like to give.
const defaultIdle = 75 * time.Second

// insideEnv tells the second run of this binary where its cluster is.
const insideEnv = "ATOLL_E2E_DATA"

func TestMain(m *testing.M) {
	flag.Parse()
	if testing.Short() || os.Getenv(insideEnv) != "" {
		os.Exit(m.Run())
	}
	os.Exit(runWithCluster())
}

// runWithCluster brings a cluster up, runs the tests inside it, and takes it
// down. It returns the exit code.
func runWithCluster() (code int) {
	if os.Geteuid() != 0 {
		fmt.Println("FAIL: e2e needs root: it makes network namespaces and taps")
		return 1
	}
	atoll := filepath.Join(repoRoot(), "bin", "atoll")
	if _, err := os.Stat(atoll); err != nil {
		fmt.Printf("FAIL: %v: run `make build` first\n", err)
		return 1
	}
	data, err := os.MkdirTemp("", "atoll-e2e-")
	if err != nil {
		fmt.Println("FAIL:", err)
		return 1
	}
	before := leftovers(atoll)
	defer func() {
		if os.Getenv("ATOLL_E2E_KEEP") != "" {
			fmt.Printf("kept: %s --data-dir %s enter -- bash\n", atoll, data)
			return
		}
		if code != 0 {
			printLogs(data)
		}
		if err := takeDown(atoll, data, before); err != nil {
			fmt.Println("FAIL: after the tests:", err)
			code = 1
		}
	}()
	start := time.Now()
	if out, err := exec.Command(atoll, "--data-dir", data, "up", "--isolated").CombinedOutput(); err != nil {
		fmt.Printf("FAIL: atoll up: %v\n%s", err, out)
		return 1
	}
	fmt.Printf("cluster up in %.1fs\n", time.Since(start).Seconds())
	self, err := os.Executable()
	if err != nil {
		fmt.Println("FAIL:", err)
		return 1
	}
	cmd := exec.Command(atoll, append([]string{"--data-dir", data, "enter", "--", self}, os.Args[1:]...)...)
	cmd.Env = append(os.Environ(), insideEnv+"="+data)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return 1
	}
	return 0
}

// takeDown stops the cluster, erases its data and looks for leftovers that
// were not there before.
func takeDown(atoll, data string, before map[string]bool) error {
	if out, err := exec.Command(atoll, "--data-dir", data, "down", "--purge").CombinedOutput(); err != nil {
		return fmt.Errorf("atoll down --purge: %w\n%s", err, out)
	}
	var left []string
	for line := range leftovers(atoll) {
		if !before[line] {
			left = append(left, line)
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
	if _, err := os.Stat(data); err == nil {
		return fmt.Errorf("down --purge left the data directory %s", data)
	}
	return nil
}

// leftovers is what Atoll has on this host, a line each: nothing, but for
// another cluster of whoever works here.
func leftovers(atoll string) map[string]bool {
	out, err := exec.Command(atoll, "leftovers").Output() // it fails when there is something
	lines := map[string]bool{}
	if len(out) == 0 {
		lines[fmt.Sprintf("atoll leftovers said nothing: %v", err)] = true
	}
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSpace(line)
		if line != "" && line != nothingLeft {
			lines[line] = true
		}
	}
	return lines
}

// nothingLeft is what `atoll leftovers` says then.
const nothingLeft = "nothing is left"

// printLogs shows the end of each component's log, for a run that failed
// where nobody can look afterwards.
func printLogs(data string) {
	logs, _ := filepath.Glob(filepath.Join(data, "log", "*.log"))
	for _, l := range logs {
		if filepath.Base(l) == "audit.log" {
			continue // one line an API call: nothing to find in its tail
		}
		out, _ := exec.Command("tail", "-n", "60", l).Output()
		fmt.Printf("--- %s\n%s", l, out)
	}
}

func repoRoot() string {
	wd, err := os.Getwd()
	if err != nil {
		panic(err)
	}
	return filepath.Dir(wd)
}

// TestScripts runs the scripts that leave the node's daemon alone, side by side.
func TestScripts(t *testing.T) {
	p := params(t)
	p.Dir = "testdata"
	run(t, p)
}

// TestScriptsAlone runs, one after the other, those that kill it: streams of
// other scripts would end with it.
func TestScriptsAlone(t *testing.T) {
	files, err := filepath.Glob("testdata/alone/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) {
			p := params(t)
			p.Files = []string{f}
			run(t, p)
		})
	}
}

func params(t *testing.T) testscript.Params {
	data := os.Getenv(insideEnv)
	if data == "" {
		t.Skip("needs a cluster; not with -short")
	}
	return testscript.Params{
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup:               func(env *testscript.Env) error { return setup(env, data) },
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"eventually": cmdEventually,
			"until":      cmdUntil,
			"expect":     cmdExpect,
			"sametree":   cmdSameTree,
			"finally":    cmdFinally,
			"registry":   cmdRegistry,
		},
	}
}

// setup gives a script its own Kubernetes namespace and a kubeconfig that
// points at it; both go when the script ends.
func setup(env *testscript.Env, data string) error {
	root := repoRoot()
	name := strings.TrimSuffix(filepath.Base(env.WorkDir), ".txt")
	name = "e2e-" + strings.TrimPrefix(name, "script-")
	kubeconfig := filepath.Join(env.WorkDir, ".kubeconfig")
	admin, err := os.ReadFile(filepath.Join(data, "kubeconfig"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(kubeconfig, admin, 0o600); err != nil {
		return err
	}
	kubectl := filepath.Join(root, "bin", "kubectl")
	run := func(args ...string) error {
		out, err := exec.Command(kubectl, append([]string{"--kubeconfig", kubeconfig}, args...)...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("kubectl %s: %w\n%s", strings.Join(args, " "), err, out)
		}
		return nil
	}
	if err := run("create", "namespace", name); err != nil {
		return err
	}
	if err := run("config", "set-context", "--current", "--namespace", name); err != nil {
		return err
	}
	if err := run("wait", "--for=create", "serviceaccount/default", "-n", name, "--timeout=30s"); err != nil {
		return err
	}
	env.Defer(func() {
		// Pods first and at once, so that the next script finds the memory free.
		_ = run("delete", "pods", "--all", "-n", name, "--grace-period=1", "--wait=false")
		_ = run("delete", "namespace", name, "--wait=false")
	})
	env.Setenv("PATH", filepath.Join(root, "bin")+":"+os.Getenv("PATH"))
	env.Setenv("HOME", env.WorkDir)
	env.Setenv("KUBECONFIG", kubeconfig)
	env.Setenv("NS", name)
	env.Setenv("DATA", data)
	env.Setenv("ROOT", root)
	for _, name := range []string{"GOVC_URL", "GOVC_USERNAME", "GOVC_PASSWORD", "GOVC_TLS_CA_CERTS"} { // of atoll enter
		env.Setenv(name, os.Getenv(name))
	}
	bootID, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	idle := defaultIdle
	if s := os.Getenv("ATOLL_IDLE"); s != "" {
		if idle, err = time.ParseDuration(s); err != nil {
			return fmt.Errorf("ATOLL_IDLE: %w", err)
		}
	}
	env.Setenv("IDLE", strconv.Itoa(int(idle.Seconds())))
	env.Setenv("HOST_BOOT_ID", strings.TrimSpace(string(bootID)))
	return nil
}
