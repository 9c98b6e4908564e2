package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// restartDelay is how long after its end spherelet is started again: the
// RestartSec of deploy/systemd/spherelet.service.
const restartDelay = 500 * time.Millisecond

// An agent is this cluster's spherelet. `atoll up` has started the first one;
// the others are children of this process, with the same arguments and the
// same environment.
type agent struct {
	argv, env []string
	log       string
	// record is where `atoll` looks for the process.
	record string

	pid     int
	started time.Time
	// ended is closed once a child of this process is gone, and state says how;
	// nil for the first.
	ended chan struct{}
	state *os.ProcessState
}

// A processRecord names a process in atoll's way: by pid, start time and boot.
type processRecord struct {
	PID    int       `json:"pid"`
	Start  uint64    `json:"start"`
	BootID string    `json:"bootID"`
	Since  time.Time `json:"since"`
}

// findAgent finds the spherelet that `atoll up` has started.
func findAgent(atoll, data string) (*agent, error) {
	out, err := exec.Command(atoll, "--data-dir", data, "status", "-o", "json").Output()
	if err != nil {
		return nil, fmt.Errorf("atoll status: %w", err)
	}
	var status struct {
		ID        string
		Processes []struct {
			Name, Log string
			PID       int
		}
	}
	if err := json.Unmarshal(out, &status); err != nil {
		return nil, err
	}
	for _, p := range status.Processes {
		if p.Name != "spherelet" || p.PID == 0 {
			continue
		}
		a := &agent{pid: p.PID, log: p.Log, started: time.Now(), record: filepath.Join("/run/atoll", status.ID, "spherelet.json")}
		if _, err := os.Stat(a.record); err != nil {
			return nil, err
		}
		if a.argv, err = procStrings(p.PID, "cmdline"); err != nil {
			return nil, err
		}
		a.env, err = procStrings(p.PID, "environ")
		return a, err
	}
	return nil, errors.New("atoll status names no spherelet that runs")
}

func procStrings(pid int, name string) ([]string, error) {
	b, err := os.ReadFile(procFile(pid, name))
	if err != nil {
		return nil, err
	}
	return strings.Split(string(bytes.TrimSuffix(b, []byte{0})), "\x00"), nil
}

func procFile(pid int, name string) string {
	return filepath.Join("/proc", strconv.Itoa(pid), name)
}

// kill sends SIGKILL and returns when the process is gone.
func (a *agent) kill() error {
	select {
	case <-a.ended:
		return a.endedItself()
	default:
	}
	if err := syscall.Kill(a.pid, syscall.SIGKILL); err != nil {
		return fmt.Errorf("spherelet (pid %d) is gone already: %w; see %s", a.pid, err, a.log)
	}
	if a.ended != nil {
		<-a.ended
		if ws, ok := a.state.Sys().(syscall.WaitStatus); !ok || ws.Signal() != syscall.SIGKILL {
			return a.endedItself()
		}
		return nil
	}
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if _, running := startTime(a.pid); !running {
			return nil
		}
	}
	return fmt.Errorf("spherelet (pid %d) lives on after SIGKILL", a.pid)
}

// endedItself is the error of a spherelet that nobody killed.
func (a *agent) endedItself() error {
	text, _ := os.ReadFile(a.log)
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return fmt.Errorf("spherelet (pid %d) ended by itself: %s; its last lines:\n%s", a.pid, a.state, strings.Join(lines[max(0, len(lines)-5):], "\n"))
}

// start starts spherelet again, in a session of its own, and records it.
func (a *agent) start() error {
	log, err := os.OpenFile(a.log, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(a.argv[0], a.argv[1:]...)
	cmd.Env, cmd.Dir = a.env, "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	a.pid, a.started = cmd.Process.Pid, time.Now()
	ended := make(chan struct{})
	a.ended = ended
	go func() {
		_ = cmd.Wait() // "signal: killed", most times
		a.state = cmd.ProcessState
		close(ended)
	}()
	return a.save()
}

func (a *agent) save() error {
	start, running := startTime(a.pid)
	if !running {
		return fmt.Errorf("spherelet ended at once; see %s", a.log)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	text, err := json.Marshal(processRecord{PID: a.pid, Start: start, BootID: strings.TrimSpace(string(boot)), Since: a.started.UTC()})
	if err != nil {
		return err
	}
	if err := os.WriteFile(a.record+".new", text, 0o600); err != nil {
		return err
	}
	return os.Rename(a.record+".new", a.record)
}

// startTime returns a process's start time in clock ticks since boot.
func startTime(pid int) (ticks uint64, running bool) {
	b, err := os.ReadFile(procFile(pid, "stat"))
	if err != nil {
		return 0, false
	}
	// The command, in parentheses, may contain anything.
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return 0, false
	}
	ticks, err = strconv.ParseUint(fields[19], 10, 64)
	return ticks, err == nil
}

// A vm is a QEMU process.
type vm struct {
	PID   int
	Start uint64
}

// vms finds the QEMU processes of a node by its cgroup, and names them by pod
// VM (UID_attempt).
func vms(cgroup string) (map[string]vm, error) {
	found := map[string]vm{}
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		name, ok := vmName(file)
		if !ok {
			continue
		}
		// Others may run clusters on this machine as well.
		groups, err := os.ReadFile(filepath.Join(filepath.Dir(file), "cgroup"))
		if err != nil || !strings.Contains(string(groups), cgroup+"/") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			continue
		}
		if start, running := startTime(pid); running {
			if _, twice := found[name]; twice {
				return nil, fmt.Errorf("pod VM %s runs twice", name)
			}
			found[name] = vm{PID: pid, Start: start}
		}
	}
	return found, nil
}

// vmName reads a pod VM's name off a QEMU's command line.
func vmName(cmdline string) (string, bool) {
	b, err := os.ReadFile(cmdline)
	if err != nil {
		return "", false
	}
	_, rest, ok := strings.Cut(string(b), "\x00-name\x00")
	if !ok || !strings.Contains(string(b), "qemu-system-") {
		return "", false
	}
	name, _, _ := strings.Cut(rest, "\x00")
	name, _, _ = strings.Cut(strings.TrimPrefix(name, "guest="), ",")
	return strings.CutPrefix(name, "atoll-")
}
