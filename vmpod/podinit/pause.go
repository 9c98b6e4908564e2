package podinit

import (
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// pauseName is argv[0] of the process that holds a pod's PID namespace.
const pauseName = "atoll-pause"

// pause is PID 1 of the pod's shared PID namespace: it reaps, and ends on
// SIGTERM or SIGINT.
func pause() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGCHLD, unix.SIGTERM, unix.SIGINT)
	for s := range c {
		if s != unix.SIGCHLD {
			os.Exit(0)
		}
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if err != unix.EINTR && (err != nil || pid <= 0) {
				break
			}
		}
	}
}

// startPause starts it and returns the path of its PID namespace.
func (r *reaper) startPause() (string, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer null.Close()
	pid, _, err := r.spawn("/proc/self/exe", []string{pauseName}, &syscall.ProcAttr{
		Dir:   "/",
		Files: []uintptr{null.Fd(), null.Fd(), null.Fd()},
		Sys:   &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID},
	})
	if err != nil {
		return "", fmt.Errorf("start the pod's pause process: %w", err)
	}
	return "/proc/" + strconv.Itoa(pid) + "/ns/pid", nil
}
