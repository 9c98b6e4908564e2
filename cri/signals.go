package cri

import (
	"fmt"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Real-time signals as glibc numbers them.
const sigRTMin, sigRTMax = 34, 64

// parseSignal reads "SIGTERM", "TERM", "15", "SIGRTMIN+3", "RTMAX-1".
func parseSignal(name string) (syscall.Signal, error) {
	n := strings.ToUpper(strings.TrimSpace(name))
	if i, err := strconv.Atoi(n); err == nil && i > 0 && i <= sigRTMax {
		return syscall.Signal(i), nil
	}
	if !strings.HasPrefix(n, "SIG") {
		n = "SIG" + n
	}
	if alias, ok := signalNames[n]; ok {
		n = alias
	}
	if s := unix.SignalNum(n); s != 0 {
		return s, nil
	}
	for prefix, base := range map[string]int{"SIGRTMIN": sigRTMin, "SIGRTMAX": sigRTMax} {
		rest, ok := strings.CutPrefix(n, prefix)
		if !ok {
			continue
		}
		d, err := strconv.Atoi(rest)
		if rest == "" {
			d, err = 0, nil
		}
		if s := base + d; err == nil && s >= sigRTMin && s <= sigRTMax {
			return syscall.Signal(s), nil
		}
	}
	return 0, fmt.Errorf("signal %q is not known: %w", name, errdefs.ErrInvalidArgument)
}

// criSignalName is the name behind CRI's enum: RTMINPLUS and RTMAXMINUS
// written with their signs.
func criSignalName(s runtimeapi.Signal) string {
	return strings.NewReplacer("PLUS", "+", "MINUS", "-").Replace(s.String())
}

// toCRISignal is the enum for an image's STOPSIGNAL; RUNTIME_DEFAULT if CRI
// has no name for it.
func toCRISignal(name string) runtimeapi.Signal {
	n := strings.ToUpper(name)
	if i, err := strconv.Atoi(n); err == nil {
		n = unix.SignalName(syscall.Signal(i))
	}
	if n != "" && !strings.HasPrefix(n, "SIG") {
		n = "SIG" + n
	}
	n = strings.NewReplacer("+", "PLUS", "-", "MINUS").Replace(n)
	return runtimeapi.Signal(runtimeapi.Signal_value[n])
}

// stopSignal is what StopContainer sends first: the container's choice, else
// the image's, else SIGTERM. What neither knows is SIGTERM too.
func stopSignal(c *container) syscall.Signal {
	if c.StopSignal == runtimeapi.Signal_RUNTIME_DEFAULT {
		return syscall.SIGTERM
	}
	if s, err := parseSignal(criSignalName(c.StopSignal)); err == nil {
		return s
	}
	return syscall.SIGTERM
}
