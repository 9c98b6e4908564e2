package podinit

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// A mountSpec is one mount that the machine itself needs.
type mountSpec struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

func mountAll(specs []mountSpec) error {
	for _, m := range specs {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

const quietMount = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// mountBase mounts what loading modules and logging need.
func mountBase() error {
	return mountAll([]mountSpec{
		{"proc", "/proc", "proc", quietMount, ""},
		{"sysfs", "/sys", "sysfs", quietMount, ""},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
	})
}

// mountRest mounts everything else, and hands out the cgroup controllers.
func mountRest() error {
	err := mountAll([]mountSpec{
		{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"},
		{"shm", "/dev/shm", "tmpfs", quietMount, "mode=1777,size=65536k"},
		{"mqueue", "/dev/mqueue", "mqueue", quietMount, ""},
		{"run", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
		{"tmp", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"cgroup2", cgroupRoot, "cgroup2", quietMount, "nsdelegate,memory_recursiveprot"},
	})
	if err != nil {
		return err
	}
	// Containers may ask for their mounts to be seen by their neighbours.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share mounts: %w", err)
	}
	if err := os.MkdirAll(podCgroup, 0o755); err != nil {
		return err
	}
	enableControllers(cgroupRoot)
	enableControllers(podCgroup)
	return nil
}

// leaveInitramfs puts a bind mount of the root over the root. The content is
// the same, but pivot_root(2), refused on the very first mount, works from
// then on, without copying the initramfs anywhere.
func leaveInitramfs() error {
	const over = "/mnt"
	if err := os.MkdirAll(over, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/", over, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind the root: %w", err)
	}
	if err := unix.Chdir(over); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	return unix.Chdir("/")
}

// channelModule is the last one that the agent itself needs: what stands before
// it in the directory is the bus and the channel to the host.
const channelModule = "virtio_console.ko"

// modulesIn lists the modules of a directory in the order in which they are to
// be loaded, split into those that the channel to the host needs and the rest.
// A directory that is not there means a kernel that has everything built in.
func modulesIn(dir string) (channel, rest []string) {
	files, _ := filepath.Glob(filepath.Join(dir, "*.ko"))
	sort.Strings(files)
	for i, file := range files {
		if strings.HasSuffix(file, "-"+channelModule) {
			return files[:i+1], files[i+1:]
		}
	}
	return files, nil
}

// loadModules loads modules and frees the memory that their files took.
func loadModules(files []string) {
	for _, file := range files {
		if err := loadModule(file); err != nil && !errors.Is(err, unix.EEXIST) {
			// Some drivers are for devices that this machine has not.
			slog.Warn("kernel module was not loaded", "module", filepath.Base(file), "error", err)
		}
		os.Remove(file)
	}
}

// loadBehind loads modules while the agent already answers, which goes first:
// the host greets the agent in that time, and pods need the rest only from
// SetupSandbox on. The channel is closed when all are loaded.
func loadBehind(files []string) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread's priority ends with it
		_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), 19)
		loadModules(files)
	}()
	return done
}

func loadModule(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}

// quietKernel switches off what would wake an idle guest: the search for memory
// to compact, twice a second (who needs some in one piece still gets it), and
// the watchdog for CPUs that are stuck, every 4 s (the host sees that the agent
// does not answer).
func quietKernel() {
	_ = os.WriteFile("/proc/sys/vm/compaction_proactiveness", []byte("0"), 0o644)
	_ = os.WriteFile("/proc/sys/kernel/watchdog", []byte("0"), 0o644)
}
