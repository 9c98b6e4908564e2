package overhead

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// split is a QEMU's memory in bytes: the guest's RAM, as this process alone has
// it and as it shares it, and the proportional share of all else.
type split struct{ guest, shared, rest int64 }

// guestAtLeast is the size (bytes) from which a mapping is the guest's RAM:
// QEMU itself maps nothing as large but the translated code, which is
// executable.
const guestAtLeast = 96 * mib

func readSplit(pid int, cloned bool) (split, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return split{}, err
	}
	defer f.Close()
	return parseSmaps(f, cloned)
}

// parseSmaps reads /proc/PID/smaps (proc(5)). Of a clone's RAM its own is what
// it has written to, copied by the kernel: the rest is the template's, though
// this process may be the only one to have it mapped.
func parseSmaps(r io.Reader, cloned bool) (s split, err error) {
	guest := false
	executable := false
	for sc := bufio.NewScanner(r); sc.Scan(); {
		f := strings.Fields(sc.Text())
		if len(f) >= 2 && len(f[1]) == 4 && strings.Contains(f[0], "-") { // a mapping begins
			guest, executable = false, f[1][2] == 'x'
			continue
		}
		if len(f) != 3 || f[2] != "kB" {
			continue
		}
		n, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			return s, fmt.Errorf("smaps: %q: %w", sc.Text(), err)
		}
		n <<= 10
		switch {
		case f[0] == "Size:":
			guest = n >= guestAtLeast && !executable
		case f[0] == "Pss:" && !guest:
			s.rest += n
		case guest && cloned && f[0] == "Anonymous:", guest && !cloned && (f[0] == "Private_Dirty:" || f[0] == "Private_Clean:"):
			s.guest += n
			s.shared -= n
		case guest && f[0] == "Rss:":
			s.shared += n
		}
	}
	return s, nil
}
