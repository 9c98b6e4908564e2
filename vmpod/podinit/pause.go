package podinit

import (
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"github.com/openatoll/atoll/vmpod/agentapi"
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

// startPause starts it, with a user namespace as well if ids says so, and
// returns the directory of its namespaces.
func (r *reaper) startPause(ids *agentapi.IDMap) (string, error) {
	attr := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
	if ids != nil {
		maps, err := idMaps(ids)
		if err != nil {
			return "", err
		}
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings, attr.GidMappings, attr.GidMappingsEnableSetgroups = maps, maps, true
		attr.Credential = &syscall.Credential{}
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer null.Close()
	pid, _, err := r.spawn("/proc/self/exe", []string{pauseName}, &syscall.ProcAttr{
		Dir:   "/",
		Files: []uintptr{null.Fd(), null.Fd(), null.Fd()},
		Sys:   attr,
	})
	if err != nil {
		return "", fmt.Errorf("start the pod's pause process: %w", err)
	}
	return "/proc/" + strconv.Itoa(pid) + "/ns/", nil
}
