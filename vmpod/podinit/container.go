package podinit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
)

// maxExecs is how many ended execs of a container are remembered, for a host
// that asks again.
const maxExecs = 64

// A container is one that CreateContainer made.
type container struct {
	id      string
	request *agentapi.CreateContainerRequest
	created int64
	bundle  string // on /run: config.json and the like
	root    string // its mounted root file system
	disk    string // its directory on the ephemeral disk
	cgroup  string
	binds   []bind
	logs    *logJournal
	main    *process

	mu    sync.Mutex
	execs []*process // in the order of their starts
	undo  []func() error
}

// process finds one by its exec id; empty is the container's own.
func (c *container) process(execID string) (*process, error) {
	if execID == "" {
		return c.main, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.execs {
		if p.execID == execID {
			return p, nil
		}
	}
	return nil, fmt.Errorf("container %s has no process %q: %w", c.id, execID, errdefs.ErrNotFound)
}

func (c *container) addExec(p *process) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.execs = append(c.execs, p)
	for i := 0; i < len(c.execs) && len(c.execs) > maxExecs; {
		old := c.execs[i]
		if old.ended() == nil {
			i++
			continue
		}
		old.io.close()
		c.execs = append(c.execs[:i], c.execs[i+1:]...)
	}
}

func (c *container) state() *agentapi.ContainerState {
	c.main.mu.Lock()
	defer c.main.mu.Unlock()
	s := &agentapi.ContainerState{Id: c.id, CreatedNs: c.created, StartedNs: c.main.started, Pid: int32(c.main.pid), Exit: c.main.exit}
	switch {
	case c.main.exit != nil:
		s.Phase = agentapi.ContainerState_EXITED
	case c.main.pid != 0:
		s.Phase = agentapi.ContainerState_RUNNING
	}
	return s
}

// CreateContainer mounts everything and writes the bundle; crun itself runs
// at StartProcess, once instead of twice, and what it refuses is a StartError
// as with other runtimes.
func (a *agent) CreateContainer(_ context.Context, r *agentapi.CreateContainerRequest) (*agentapi.CreateContainerResponse, error) {
	if err := a.requireSandbox(); err != nil {
		return nil, err
	}
	if err := checkID("container", r.Id); err != nil {
		return nil, err
	}
	l := a.lockOf("c/" + r.Id)
	l.Lock()
	defer l.Unlock()
	if _, err := a.container(r.Id); err == nil {
		return &agentapi.CreateContainerResponse{}, nil
	}
	c := &container{
		id: r.Id, request: r, created: time.Now().UnixNano(),
		bundle: filepath.Join(a.places.bundles, r.Id), root: filepath.Join(a.places.bundles, r.Id, "root"),
		disk: filepath.Join(a.places.disk, "c", r.Id), cgroup: filepath.Join(podCgroup, r.Id),
		main: newProcess(r.Id, ""),
	}
	// Output may be asked for before the start.
	c.main.io.tty, c.main.io.stdinEnds = r.Tty, r.StdinOnce
	if err := a.prepare(c); err != nil {
		return nil, fmt.Errorf("create container %s: %w", r.Id, errors.Join(err, c.teardown()))
	}
	a.mu.Lock()
	a.containers[r.Id] = c
	a.mu.Unlock()
	return &agentapi.CreateContainerResponse{}, nil
}

// prepare does CreateContainer's work; what it did is in c.undo.
func (a *agent) prepare(c *container) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*deviceTimeout)
	defer cancel()
	for _, d := range []string{c.bundle, c.disk} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return err
		}
		c.undo = append(c.undo, func() error { return os.RemoveAll(d) })
	}
	if err := a.mountRoot(ctx, c); err != nil {
		return err
	}
	if err := a.bindMounts(ctx, c); err != nil {
		return err
	}
	a.mu.Lock()
	sharedPID, userns, productUUID := a.sharedPID, "", a.productUUID
	if a.userns != nil {
		userns = a.userns.path
	}
	a.mu.Unlock()
	spec, sysctls, err := compose(c.request.Spec, composition{
		root: c.root, readonly: c.request.ReadonlyRootfs, cgroup: "/" + filepath.Base(podCgroup) + "/" + c.id, terminal: c.request.Tty,
		sharedPID: sharedPID, userns: userns, containerPID: a.pidNamespaceOf, binds: c.binds, shm: "/dev/shm", devices: a.cdev, productUUID: productUUID,
	})
	if err != nil {
		return err
	}
	if err := a.addDevices(spec, c.request.Devices); err != nil {
		return err
	}
	if err := setSysctls(sysctls); err != nil {
		return err
	}
	if err := writeJSON(filepath.Join(c.bundle, "config.json"), spec); err != nil {
		return err
	}
	if c.logs, err = newLogJournal(filepath.Join(c.disk, "logs")); err != nil {
		return err
	}
	c.undo = append(c.undo, func() error { c.logs.close(); return nil })
	return nil
}

// mountRoot mounts the image and the writable layer over it.
func (a *agent) mountRoot(ctx context.Context, c *container) error {
	lower, err := a.images.acquire(ctx, c.request.ImageDisk)
	if err != nil {
		return err
	}
	c.undo = append(c.undo, func() error { return a.images.release(c.request.ImageDisk) })
	upper, work := filepath.Join(c.disk, "upper"), filepath.Join(c.disk, "work")
	for _, d := range []string{upper, work, c.root} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := a.usage.projects.assign(0, upper, work); err != nil { // overlayfs renames between them
		return err
	}
	// The top directory is the upper's: it must look like the image's.
	if err := copyRootMeta(lower, upper, a.userns.shift()); err != nil {
		return err
	}
	if a.userns != nil && c.request.ImageDisk != "" {
		shifted := filepath.Join(c.bundle, "image")
		if err := a.userns.mountShifted(lower, shifted); err != nil {
			return err
		}
		c.undo = append(c.undo, func() error { return detach(shifted) })
		lower = shifted
	}
	// Nobody reads the layer after this VM is gone, so syncing it is waste.
	options := "lowerdir=" + lower + ",upperdir=" + upper + ",workdir=" + work + ",volatile"
	err = unix.Mount("overlay", c.root, "overlay", 0, options)
	if errors.Is(err, unix.EIO) {
		// The kernel wants an error of the disk to have been seen by a sync
		// before it makes another volatile layer. The host has told of it.
		forgiveDisk(upper)
		err = unix.Mount("overlay", c.root, "overlay", 0, options)
	}
	if err != nil {
		return fmt.Errorf("mount the writable layer: %w", err)
	}
	c.undo = append(c.undo, func() error { return detach(c.root) })
	return nil
}

// forgiveDisk syncs the file system of a directory, whatever comes of it.
func forgiveDisk(dir string) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if err := unix.Syncfs(fd); err != nil {
		slog.Warn("the pod's disk has had errors", "error", err)
	}
}

func copyRootMeta(from, to string, shift int) error {
	var st unix.Stat_t
	if err := unix.Stat(from, &st); err != nil {
		return err
	}
	if err := unix.Chown(to, int(st.Uid)+shift, int(st.Gid)+shift); err != nil {
		return err
	}
	if err := unix.Chmod(to, st.Mode&0o7777); err != nil {
		return err
	}
	return unix.UtimesNano(to, []unix.Timespec{st.Atim, st.Mtim})
}

// bindMounts resolves volumes, sub-paths and files of ours into c.binds.
func (a *agent) bindMounts(ctx context.Context, c *container) error {
	c.binds = append(c.binds,
		bind{source: filepath.Join(a.places.etc, "hostname"), destination: "/etc/hostname", optional: true},
		bind{source: filepath.Join(a.places.etc, "resolv.conf"), destination: "/etc/resolv.conf", optional: true})
	if f, err := openInRoot(c.root, "/etc/machine-id"); err == nil { // only where the image has one
		f.Close()
		c.binds = append(c.binds, bind{source: filepath.Join(a.places.etc, "machine-id"), destination: "/etc/machine-id", readOnly: true, optional: true})
	}
	for i, m := range c.request.Mounts {
		if !filepath.IsAbs(m.Destination) {
			return fmt.Errorf("mount of volume %s: destination %q is not absolute: %w", m.Volume+m.ImageDisk, m.Destination, errdefs.ErrInvalidArgument)
		}
		find := a.volumeSource
		if m.ImageDisk != "" {
			find = a.imageSource
		}
		source, err := find(ctx, c, i, m)
		if err != nil {
			return fmt.Errorf("mount of volume %s at %s: %w", m.Volume+m.ImageDisk, m.Destination, err)
		}
		c.binds = append(c.binds, bind{source: source, destination: m.Destination, readOnly: m.ReadOnly || m.ImageDisk != "", recursive: m.RecursiveReadOnly, propagation: m.Propagation})
	}
	if p := c.request.TerminationMessagePath; p != "" {
		file := filepath.Join(c.disk, "termination")
		if err := os.WriteFile(file, nil, 0o666); err != nil {
			return err
		}
		if err := os.Chmod(file, 0o666); err != nil {
			return err
		}
		c.binds = append(c.binds, bind{source: file, destination: p})
	}
	return nil
}

// volumeSource returns what to mount of a volume. A sub-path is bound to a
// place of ours while we hold it open, so that what was checked is what is
// mounted.
func (a *agent) volumeSource(_ context.Context, c *container, i int, m *agentapi.VolumeMount) (string, error) {
	v, err := a.mountable(m.Volume)
	if err != nil {
		return "", err
	}
	if m.SubPath == "" {
		return v.root, nil
	}
	f, err := openSubPath(v.root, m.SubPath)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return c.bindSubPath(i, m.SubPath, f)
}

// imageSource mounts an image's disk, for the containers that have it as a
// volume, and returns what to mount of it.
func (a *agent) imageSource(ctx context.Context, c *container, i int, m *agentapi.VolumeMount) (string, error) {
	source, err := a.images.acquire(ctx, m.ImageDisk)
	if err != nil {
		return "", err
	}
	c.undo = append(c.undo, func() error { return a.images.release(m.ImageDisk) })
	if a.userns != nil {
		shifted := filepath.Join(c.bundle, "image"+strconv.Itoa(i))
		if err := a.userns.mountShifted(source, shifted); err != nil {
			return "", err
		}
		c.undo = append(c.undo, func() error { return detach(shifted) })
		source = shifted
	}
	if m.SubPath == "" {
		return source, nil
	}
	f, err := openImageDirectory(source, m.SubPath)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return c.bindSubPath(i, m.SubPath, f)
}

// bindSubPath binds what is open to a place of ours.
func (c *container) bindSubPath(i int, sub string, f *os.File) (string, error) {
	target := filepath.Join(c.bundle, "sub"+strconv.Itoa(i))
	st, err := f.Stat()
	if err != nil {
		return "", err
	}
	if st.IsDir() {
		err = os.Mkdir(target, 0o755)
	} else {
		err = os.WriteFile(target, nil, 0o644)
	}
	if err != nil {
		return "", err
	}
	if err := unix.Mount("/proc/self/fd/"+strconv.Itoa(int(f.Fd())), target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return "", fmt.Errorf("bind sub-path %q: %w", sub, err)
	}
	c.undo = append(c.undo, func() error { return detach(target) })
	return target, nil
}

// pidNamespaceOf is for a container that joins another one's processes.
func (a *agent) pidNamespaceOf(id string) (string, error) {
	c, err := a.container(id)
	if err != nil {
		return "", err
	}
	if !c.main.running() {
		return "", fmt.Errorf("container %s is not running, its processes cannot be joined: %w", id, errdefs.ErrFailedPrecondition)
	}
	return "/proc/" + strconv.Itoa(int(c.main.response().Pid)) + "/ns/pid", nil
}

func writeJSON(file string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o600)
}

// startContainer runs crun and watches what it started.
func (a *agent) startContainer(c *container) (*agentapi.StartProcessResponse, error) {
	l := a.lockOf("c/" + c.id)
	l.Lock()
	defer l.Unlock()
	if exit := c.main.ended(); exit != nil && exit.Reason == reasonStartError {
		return nil, fmt.Errorf("start container %s: %s: %w", c.id, exit.Message, errdefs.ErrFailedPrecondition)
	}
	if r := c.main.response(); r.Pid != 0 {
		return r, nil
	}
	pid, ended, err := a.launch(launch{verb: []string{"run", "--bundle", c.bundle}, id: c.id, dir: c.bundle, tty: c.request.Tty, stdin: c.request.Stdin}, c.main.io)
	if err != nil {
		c.main.finish(a.exits, startErrorCode, reasonStartError, err.Error())
		c.main.io.endOutput(0)
		c.main.io.endOutput(1)
		_ = c.logs.append(&agentapi.LogRecord{TimeNs: time.Now().UnixNano(), Eof: true})
		return nil, fmt.Errorf("start container %s: %w", c.id, err)
	}
	c.main.begin(pid)
	go c.main.io.journal(c.logs)
	go a.watch(c, ended)
	return c.main.response(), nil
}

// watch waits for the container's first process and ends what it leaves.
func (a *agent) watch(c *container, ended <-chan unix.WaitStatus) {
	ws := <-ended
	if err := killCgroup(c.cgroup); err != nil && !errors.Is(err, os.ErrNotExist) {
		slog.Warn("processes may be left", "container", c.id, "error", err)
	}
	code := exitCode(ws)
	reason, message := reasonOf(code), ""
	if ws.Signaled() && ws.Signal() == unix.SIGKILL && oomKills(c.cgroup) > 0 {
		reason, message = reasonOOM, "the container used more memory than its limit, or the pod's VM was out of memory"
	}
	c.main.finish(a.exits, code, reason, message)
}

// RemoveContainer kills what is left, unmounts and forgets.
func (a *agent) RemoveContainer(_ context.Context, r *agentapi.RemoveContainerRequest) (*agentapi.RemoveContainerResponse, error) {
	if err := a.requireSandbox(); err != nil {
		return nil, err
	}
	l := a.lockOf("c/" + r.Id)
	l.Lock()
	defer l.Unlock()
	c, err := a.container(r.Id)
	if err != nil { // removing what is gone succeeds
		return &agentapi.RemoveContainerResponse{}, nil
	}
	if c.main.running() {
		if err := killCgroup(c.cgroup); err != nil {
			return nil, fmt.Errorf("remove container %s: %w", c.id, err)
		}
		select {
		case <-c.main.done:
		case <-time.After(deviceTimeout):
			return nil, fmt.Errorf("remove container %s: its processes do not end: %w", c.id, errdefs.ErrUnavailable)
		}
	}
	c.mu.Lock()
	for _, p := range c.execs {
		p.io.close()
	}
	c.mu.Unlock()
	c.undo = append(c.undo, func() error { return os.RemoveAll(filepath.Join(a.places.crun, c.id)) },
		func() error { return removeCgroup(c.cgroup) }, func() error { c.main.io.close(); return nil })
	if err := c.teardown(); err != nil {
		return nil, fmt.Errorf("remove container %s: %w", c.id, err)
	}
	a.mu.Lock()
	delete(a.containers, c.id)
	a.mu.Unlock()
	a.dropLock("c/" + c.id)
	return &agentapi.RemoveContainerResponse{}, nil
}

// dropLock forgets the lock of what is gone; whoever still waits for it finds
// nothing then.
func (a *agent) dropLock(key string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.creating, key)
}

// teardown undoes what was done, last first. What failed stays for the next
// call.
func (c *container) teardown() error {
	for len(c.undo) > 0 {
		last := len(c.undo) - 1
		if err := c.undo[last](); err != nil {
			return err
		}
		c.undo = c.undo[:last]
	}
	return nil
}
