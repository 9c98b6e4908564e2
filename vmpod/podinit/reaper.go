package podinit

import (
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// A reaper waits for every child of PID 1, those it started and those that
// were left to it: a container's first process is started by crun, which then
// ends. Nothing else in the program may wait for children (so no os/exec).
type reaper struct {
	mu      sync.Mutex
	seq     uint64 // counts ended children
	waiting map[int]chan<- unix.WaitStatus
	// early holds children that ended before anybody asked for them: a
	// container can be over before its pid is known.
	early []earlyExit
}

type earlyExit struct {
	pid    int
	seq    uint64
	status unix.WaitStatus
}

// maxEarly is more than can end while one crun runs.
const maxEarly = 1024

func newReaper() *reaper { return &reaper{waiting: map[int]chan<- unix.WaitStatus{}} }

func (r *reaper) loop() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGCHLD)
	for {
		r.reap()
		<-c
	}
}

func (r *reaper) reap() {
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		r.ended(pid, ws)
	}
}

func (r *reaper) ended(pid int, ws unix.WaitStatus) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seq++
	if c, ok := r.waiting[pid]; ok {
		delete(r.waiting, pid)
		c <- ws
		return
	}
	if len(r.early) >= maxEarly {
		r.early = append(r.early[:0], r.early[maxEarly/2:]...)
	}
	r.early = append(r.early, earlyExit{pid, r.seq, ws})
}

// mark is to be taken before a process is started, and given to await.
func (r *reaper) mark() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seq
}

// await returns a channel that gets the process's status once. Only a process
// that ended after the mark counts, so that a pid used again is no riddle.
func (r *reaper) await(pid int, mark uint64) <-chan unix.WaitStatus {
	c := make(chan unix.WaitStatus, 1)
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, e := range r.early {
		if e.pid == pid && e.seq > mark {
			r.early = append(r.early[:i], r.early[i+1:]...)
			c <- e.status
			return c
		}
	}
	r.waiting[pid] = c
	return c
}

// spawn starts a program and returns its pid and the channel of its status.
func (r *reaper) spawn(path string, argv []string, attr *syscall.ProcAttr) (int, <-chan unix.WaitStatus, error) {
	mark := r.mark()
	var pid int
	var err error
	withDefaultSlack(func() { pid, err = syscall.ForkExec(path, argv, attr) })
	if err != nil {
		return 0, nil, err
	}
	return pid, r.await(pid, mark), nil
}

// exitCode is 128+n for signal n, as shells have it.
func exitCode(ws unix.WaitStatus) int32 {
	if ws.Signaled() {
		return 128 + int32(ws.Signal())
	}
	return int32(ws.ExitStatus())
}
