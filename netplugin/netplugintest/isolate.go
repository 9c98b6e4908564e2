package netplugintest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

const isolatedEnv = "ATOLL_TEST_ISOLATED"

// Isolate runs the tests of a package in a network namespace of their own, in
// a child process, so that the whole process is in it and nothing is left
// behind. Call it from TestMain. Without the right to make a namespace the
// tests run with Isolated reporting false.
func Isolate(m *testing.M) {
	if os.Getenv(isolatedEnv) != "" {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), isolatedEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		os.Exit(0)
	case errors.As(err, &exit):
		os.Exit(exit.ExitCode())
	case errors.Is(err, syscall.EPERM):
		fmt.Fprintln(os.Stderr, "no right to make a network namespace: tests that need one are skipped")
		os.Exit(m.Run())
	default:
		fmt.Fprintln(os.Stderr, "isolate:", err)
		os.Exit(1)
	}
}

// Isolated skips the test unless it runs in a namespace of Isolate.
func Isolated(t testing.TB) {
	t.Helper()
	if os.Getenv(isolatedEnv) == "" {
		t.Skip("needs a network namespace of its own (run as root)")
	}
}
