// Command hello is an /init for tests: it loads the modules, says what it sees
// on the console and powers off.
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
	var uts unix.Utsname
	unix.Uname(&uts)
	fmt.Printf("HELLO %s modules %d of %d\n", unix.ByteSliceToString(uts.Release[:]), loaded, len(files))
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}
