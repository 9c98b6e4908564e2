// Command hello is an /init for tests: it loads the modules, runs itself in a
// container, says what it sees on the console and powers off.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == "container" {
		host, _ := os.Hostname()
		fmt.Printf("CONTAINER pid %d host %s\n", os.Getpid(), host)
		return
	}
	files, _ := filepath.Glob("/modules/*.ko") // sorted
	loaded := 0
	for _, file := range files {
		f, err := os.Open(file)
		if err == nil {
			err = unix.FinitModule(int(f.Fd()), "", 0)
			f.Close()
		}
		if err != nil {
			fmt.Printf("MODULE %s: %v\n", file, err)
			continue
		}
		loaded++
	}
	unix.Mount("proc", "/proc", "proc", 0, "")
	filesystems, _ := os.ReadFile("/proc/filesystems")
	for _, fs := range []string{"erofs", "overlay", "ext4", "cgroup2", "tmpfs"} {
		fmt.Printf("FS %s %t\n", fs, strings.Contains(string(filesystems), "\t"+fs+"\n"))
	}
	out, err := exec.Command("/usr/bin/crun", "--version").CombinedOutput()
	first, _, _ := strings.Cut(string(out), "\n")
	fmt.Printf("CRUN %q %v\n", first, err)
	if out, err := container(); err != nil {
		fmt.Printf("CONTAINER %v\n%s\n", err, out)
	} else {
		fmt.Printf("%s", out)
	}
	var uts unix.Utsname
	unix.Uname(&uts)
	fmt.Printf("HELLO %s modules %d of %d\n", unix.ByteSliceToString(uts.Release[:]), loaded, len(files))
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// spec uses what containers lean on the kernel for: all namespaces, a seccomp
// filter, a device list (an eBPF program in cgroup v2), limits.
const spec = `{
 "ociVersion": "1.0.2", "hostname": "box", "root": {"path": "rootfs"},
 "process": {"args": ["/init", "container"], "cwd": "/", "user": {"uid": 1000, "gid": 1000}, "noNewPrivileges": true},
 "mounts": [
  {"destination": "/proc", "type": "proc", "source": "proc"},
  {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
  {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue"},
  {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]}
 ],
 "linux": {
  "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "ipc"}, {"type": "network"}, {"type": "cgroup"}],
  "cgroupsPath": "/box",
  "resources": {
   "devices": [{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}],
   "memory": {"limit": 33554432}, "cpu": {"shares": 512, "quota": 50000, "period": 100000}, "pids": {"limit": 100}
  },
  "seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["kexec_load"], "action": "SCMP_ACT_ERRNO"}]}
 }
}`

func container() ([]byte, error) {
	unix.Mount("sys", "/sys", "sysfs", 0, "")
	if err := unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""); err != nil {
		return nil, fmt.Errorf("cgroup2: %w", err)
	}
	if err := os.WriteFile("/sys/fs/cgroup/cgroup.subtree_control", []byte("+cpu +memory +pids"), 0); err != nil {
		return nil, err
	}
	unix.Mount("run", "/run", "tmpfs", 0, "")
	self, err := os.ReadFile("/init")
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll("/run/box/rootfs", 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile("/run/box/rootfs/init", self, 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile("/run/box/config.json", []byte(spec), 0o644); err != nil {
		return nil, err
	}
	// The root is still the initramfs, which cannot be pivoted away from.
	return exec.Command("/usr/bin/crun", "--cgroup-manager=cgroupfs", "run", "--no-pivot", "--bundle", "/run/box", "box").CombinedOutput()
}
