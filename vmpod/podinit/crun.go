package podinit

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// crunFile is where the initramfs has it.
const crunFile = "/usr/bin/crun"

// sealCrun moves a program into a sealed memfd and returns the path by which
// this process can start it. crun copies itself into one at every start
// unless it runs from one already (so that a container cannot write to it:
// CVE-2019-5736), and the copying and starting twice is most of its time:
// docs/decisions/0001-crun-in-the-guest.md.
//
// The descriptor stays open as long as the process.
func sealCrun(file string) (string, error) {
	program, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	fd, err := unix.MemfdCreate("crun", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return "", fmt.Errorf("memfd: %w", err)
	}
	for len(program) > 0 {
		n, err := unix.Write(fd, program)
		if err != nil {
			unix.Close(fd)
			return "", fmt.Errorf("memfd: %w", err)
		}
		program = program[n:]
	}
	const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		unix.Close(fd)
		return "", fmt.Errorf("seal memfd: %w", err)
	}
	return "/proc/self/fd/" + strconv.Itoa(fd), os.Remove(file)
}

// A launch is one process that crun is to start.
type launch struct {
	verb  []string // run or exec with its options, without those of launch
	id    string   // the container
	dir   string   // for files of this launch, which are removed
	tty   bool
	stdin bool
}

// launchSeq numbers launches, for short socket names.
var launchSeq atomic.Uint64

// launch starts a process, fills in its streams, and returns its pid and the
// channel of its status. It fails with what crun said: ErrNotFound where the command is
// not in the image, else ErrInvalidArgument, for it is always about the spec.
func (a *agent) launch(l launch, sio *stdio) (pid int, ended <-chan unix.WaitStatus, err error) {
	child, err := sio.open(l.tty, l.stdin)
	if err != nil {
		return 0, nil, err
	}
	defer closeAll(child[:])
	defer func() {
		if err != nil {
			sio.close()
		}
	}()
	base := filepath.Join(l.dir, "l"+strconv.FormatUint(launchSeq.Add(1), 36))
	logFile, pidFile, socket := base+".log", base+".pid", filepath.Join(a.places.run, filepath.Base(base))
	defer os.Remove(logFile)
	defer os.Remove(pidFile)
	argv := []string{"crun", "--root", a.places.crun, "--cgroup-manager=cgroupfs", "--log", logFile, "--log-format", "json"}
	argv = append(argv, l.verb...)
	argv = append(argv, "--detach", "--pid-file", pidFile)
	var console *net.UnixListener
	if l.tty {
		if console, err = net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"}); err != nil {
			return 0, nil, err
		}
		defer console.Close()
		argv = append(argv, "--console-socket", socket)
	}
	argv = append(argv, l.id)
	mark := a.reaper.mark()
	crun, status, err := a.reaper.spawn(a.crun, argv, &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Files: []uintptr{child[0].Fd(), child[1].Fd(), child[2].Fd()},
	})
	if err != nil {
		return 0, nil, fmt.Errorf("start crun: %w", err)
	}
	// The OOM killer spares us, and so our children, but not the containers;
	// crun leaves the value alone where the spec says 0.
	_ = os.WriteFile("/proc/"+strconv.Itoa(crun)+"/oom_score_adj", []byte("0"), 0)
	if ws := <-status; exitCode(ws) != 0 {
		return 0, nil, crunError(logFile, ws)
	}
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return 0, nil, fmt.Errorf("crun left no pid: %w", err)
	}
	if pid, err = strconv.Atoi(strings.TrimSpace(string(text))); err != nil || pid <= 1 {
		return 0, nil, fmt.Errorf("crun left the pid %q: %w", text, errdefs.ErrInternal)
	}
	ended = a.reaper.await(pid, mark)
	if l.tty {
		console.SetDeadline(time.Now().Add(10 * time.Second))
		master, err := receiveMaster(console)
		if err != nil {
			_ = unix.Kill(pid, unix.SIGKILL)
			return 0, nil, fmt.Errorf("receive the terminal: %w", err)
		}
		if err := sio.setTerminal(master); err != nil {
			return 0, nil, err
		}
	}
	return pid, ended, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// receiveMaster takes the terminal's master that crun sends.
func receiveMaster(l *net.UnixListener) (*os.File, error) {
	conn, err := l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	name, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(name, oob)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return nil, errors.Join(errors.New("no descriptor came"), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, errors.Join(errors.New("no descriptor came"), err)
	}
	unix.CloseOnExec(fds[0])
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return nil, err
	}
	return os.NewFile(uintptr(fds[0]), "terminal"), nil
}

// crunError is what crun logged last, with a class.
func crunError(logFile string, ws unix.WaitStatus) error {
	text, _ := os.ReadFile(logFile)
	said := ""
	for sc := bufio.NewScanner(bytes.NewReader(text)); sc.Scan(); {
		var entry struct{ Msg, Level string }
		if json.Unmarshal(sc.Bytes(), &entry) == nil && entry.Msg != "" {
			said = entry.Msg
		}
	}
	if said == "" {
		return fmt.Errorf("crun ended with %d and no message: %w", exitCode(ws), errdefs.ErrInternal)
	}
	var class error = errdefs.ErrInvalidArgument
	if strings.Contains(said, "executable file") && strings.Contains(said, "not found") || strings.Contains(said, "No such file or directory") {
		class = errdefs.ErrNotFound
	}
	return fmt.Errorf("%s: %w", said, class)
}
