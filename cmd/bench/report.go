package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/version"
	"github.com/openatoll/atoll/vmpod/guestimage"
	"github.com/openatoll/atoll/vmpod/qemu"
)

// A report is what build/bench.json and the files of docs/bench hold: one run.
// It names no host, no address, no user and no path, so that it can be sent to
// others as it is; TestReportNamesNobody holds it to that.
type report struct {
	Format  int       `json:"format"` // 2; files of figures alone were before it
	Date    time.Time `json:"date"`   // UTC, whole minutes
	Version string    `json:"version"`
	Host    host      `json:"host"`
	// Parts are those that ran, all of them if empty.
	Parts   []string `json:"parts,omitempty"`
	Seconds int      `json:"seconds"`
	Figures results  `json:"figures"`
}

const reportFormat = 2

// A host is what figures depend on besides the code.
type host struct {
	Accelerator string `json:"accelerator"`         // kvm or tcg
	KVMReason   string `json:"kvmReason,omitempty"` // why not kvm
	CPU         string `json:"cpu"`                 // the model's name, as the kernel says it
	CPUs        int    `json:"cpus"`
	MemoryGiB   int    `json:"memoryGiB"`
	Kernel      string `json:"kernel"` // major and minor version
	Cgroup      int    `json:"cgroup"` // version of the hierarchy that VMs are in
	QEMU        string `json:"qemu"`
	// GuestFlavour is stock or tuned, GuestKernel its release.
	GuestFlavour string `json:"guestFlavour"`
	GuestKernel  string `json:"guestKernel"`
}

// sameKind says whether runs on two hosts may be compared.
func (h host) sameKind(o host) bool {
	return h.Accelerator == o.Accelerator && h.GuestFlavour == o.GuestFlavour
}

func (h host) kind() string { return h.Accelerator + "-" + h.GuestFlavour }

func (h host) String() string {
	return fmt.Sprintf("%s, %s guest kernel %s, %d x %s, %d GiB, QEMU %s", h.Accelerator, h.GuestFlavour, h.GuestKernel, h.CPUs, h.CPU, h.MemoryGiB, h.QEMU)
}

// describeHost finds the facts out.
func describeHost(ctx context.Context, guestDir string) (host, error) {
	h := host{Accelerator: string(qemu.AcceleratorTCG), CPUs: runtime.NumCPU(), Cgroup: 1}
	kvm, err := probeKVM(ctx)
	if err != nil {
		return h, err
	}
	if h.KVMReason = kvm.Reason; kvm.Usable {
		h.Accelerator = string(qemu.AcceleratorKVM)
	}
	guest, err := guestimage.Load(guestDir)
	if err != nil {
		return h, err
	}
	h.GuestFlavour, h.GuestKernel = guest.Flavour, guest.KernelRelease
	if out, err := exec.CommandContext(ctx, "qemu-system-x86_64", "-version").Output(); err == nil {
		line, _, _ := strings.Cut(string(out), "\n")
		h.QEMU = strings.TrimPrefix(line, "QEMU emulator version ")
	}
	if h.CPU, err = field("/proc/cpuinfo", "model name"); err != nil {
		return h, err
	}
	total, err := field("/proc/meminfo", "MemTotal")
	if err != nil {
		return h, err
	}
	kb, _, _ := strings.Cut(total, " ")
	if n, err := strconv.Atoi(kb); err == nil {
		h.MemoryGiB = (n + 1<<19) >> 20
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return h, err
	}
	if v := strings.SplitN(unix.ByteSliceToString(u.Release[:]), ".", 3); len(v) == 3 {
		h.Kernel = v[0] + "." + v[1]
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		h.Cgroup = 2
	}
	return h, nil
}

// probeKVM is the product's own probe, asked anew.
func probeKVM(ctx context.Context) (qemu.KVMStatus, error) {
	dir, err := os.MkdirTemp("", "atoll-bench-kvm-")
	if err != nil {
		return qemu.KVMStatus{}, err
	}
	defer os.RemoveAll(dir)
	return qemu.ProbeKVM(ctx, dir), ctx.Err()
}

// field reads "name : value" from a file of /proc.
func field(file, name string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v), nil
		}
	}
	return "", fmt.Errorf("%s has no %q", file, name)
}

func newReport(ctx context.Context, o options, figures results, began time.Time) (report, error) {
	h, err := describeHost(ctx, o.guest)
	return report{
		Format: reportFormat, Date: began.UTC().Truncate(time.Minute), Version: version.Version, Host: h,
		Parts: o.names(), Seconds: int(time.Since(began).Seconds()), Figures: figures,
	}, err
}

// addTo returns the run of a file with the figures of this one in it.
func (r report) addTo(path string) (report, error) {
	whole, err := readReport(path)
	if err != nil {
		return r, err
	}
	if !whole.Host.sameKind(r.Host) {
		return r, fmt.Errorf("%s is of another kind of host: %s", path, whole.Host)
	}
	for _, f := range r.Figures {
		if old := whole.Figures.find(f.Name); old != nil {
			*old = f
			continue
		}
		whole.Figures = append(whole.Figures, f)
	}
	whole.Seconds += r.Seconds
	return whole, nil
}

func readReport(path string) (report, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return report{}, fmt.Errorf("%w: run `make bench`", err)
	}
	return parseReport(filepath.Base(path), b)
}

func parseReport(name string, b []byte) (report, error) {
	var r report
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("%s: %w: run `make bench` anew", name, err)
	}
	if r.Format != reportFormat {
		return r, fmt.Errorf("%s has format %d, this program knows %d", name, r.Format, reportFormat)
	}
	return r, nil
}
