package main

import (
	"bufio"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"
)

var (
	//go:embed driver.yaml
	driverYAML []byte
	//go:embed class.yaml
	classYAML []byte
)

// slowAfter is how long a spec may take before what it waits for is printed.
const slowAfter = 5 * time.Minute

// writeInputs writes what the suite is told, below dir.
func writeInputs(dir, registry string, skip []string) error {
	for name, text := range map[string][]byte{
		"driver.yaml": driverYAML,
		"class.yaml":  classYAML,
		"repos.yaml":  []byte("promoterE2eRegistry: " + registry + "\n"),
		"skip":        []byte(strings.Join(skip, "\n")),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// skipped are expressions for specs that are not to run.
func skipped(o options, before *results) []string {
	var skip []string
	if o.skip != "" {
		skip = append(skip, o.skip)
	}
	if !o.all {
		for _, e := range exclusions {
			skip = append(skip, e.spec)
		}
	}
	if o.resume {
		for _, s := range before.Specs {
			if s.settled() {
				skip = append(skip, regexp.QuoteMeta(suiteName+s.Name)+"$")
			}
		}
	}
	return skip
}

// runSuite runs the suite and returns the path of Ginkgo's report.
func runSuite(ctx context.Context, o options, data, registry string, before *results) (string, error) {
	build, err := filepath.Abs(o.build)
	if err != nil {
		return "", err
	}
	bin, err := filepath.Abs(o.bin)
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "e2e-storage-inputs-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	if err := writeInputs(dir, registry, skipped(o, before)); err != nil {
		return "", err
	}
	report := filepath.Join(build, "report.json")
	if err := os.Remove(report); err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	said, err := os.Create(filepath.Join(build, "output.txt"))
	if err != nil {
		return "", err
	}
	defer said.Close()
	progress, err := startProgress(filepath.Join(dir, "progress"))
	if err != nil {
		return "", err
	}
	defer progress.stop()
	args := []string{
		fmt.Sprintf("--procs=%d", o.procs), "--no-color", "--output-dir=" + build, "--json-report=report.json",
		"--timeout=" + o.timeout.String(), "--grace-period=20s", "--poll-progress-after=" + slowAfter.String(),
	}
	if o.focus != "" {
		args = append(args, "--focus="+o.focus)
	}
	args = append(args, filepath.Join(build, "storage.test"), "--",
		"-storage.testdriver="+filepath.Join(dir, "driver.yaml"), "-repo-root="+dir, "-e2e-output-dir="+dir,
		"-kubeconfig="+filepath.Join(data, "kubeconfig"), "-kubectl-path="+filepath.Join(bin, "kubectl"),
		"-provider=local", "-dump-logs-on-failure=true", "-disable-log-dump", "-node-schedulable-timeout=1m")
	cmd := exec.CommandContext(ctx, filepath.Join(build, "ginkgo"), args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "TMPDIR="+dir, "KUBE_TEST_REPO_LIST="+filepath.Join(dir, "repos.yaml"),
		"ATOLL_E2E_STORAGE_PROGRESS="+progress.path, "ATOLL_E2E_STORAGE_SKIP="+filepath.Join(dir, "skip"))
	// Ginkgo leaves it to the terminal to tell the suite's processes.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = time.Minute
	cmd.Stdout, cmd.Stderr = said, said
	fmt.Println("e2e-storage: the suite writes", said.Name())
	err = cmd.Run()
	var exit *exec.ExitError
	if _, serr := os.Stat(report); errors.As(err, &exit) && serr == nil {
		return report, nil // some failed, or the run was ended
	}
	if err != nil {
		return "", fmt.Errorf("ginkgo: %w: see %s", err, said.Name())
	}
	return report, nil
}

// A progress prints a line for each spec that has ended, unless the suite
// skipped it. The suite's processes write to a FIFO, since Ginkgo keeps what
// they print until the spec has ended, and for all of them.
type progress struct {
	path string
	fifo *os.File
	done sync.WaitGroup
}

func startProgress(path string) (*progress, error) {
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		return nil, fmt.Errorf("mkfifo %s: %w", path, err)
	}
	// For reading and writing: it has a writer even while no spec writes.
	fifo, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	p := &progress{path: path, fifo: fifo}
	p.done.Go(p.print)
	return p, nil
}

func (p *progress) print() {
	ended := 0
	for s := bufio.NewScanner(p.fifo); s.Scan(); {
		var line struct {
			State, Name string
			Seconds     float64
		}
		if json.Unmarshal(s.Bytes(), &line) != nil || line.State == "skipped" {
			continue
		}
		ended++
		fmt.Printf("%s %4d %-8s %5.1f s  %s\n", time.Now().Format(time.TimeOnly), ended, line.State, line.Seconds, short(line.Name))
	}
}

// stop prints what was written so far.
func (p *progress) stop() {
	p.fifo.Close()
	p.done.Wait()
}
