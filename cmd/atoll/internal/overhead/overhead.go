// Package overhead measures what a pod VM costs this host beyond what its
// containers use, and how much of a VM's RAM they cannot have.
//
// A few VMs of different sizes, started by the driver and the guest that pods
// get, with a disk and a NIC, wait idle while they are looked at. They run in a
// child of this process that has PID, mount and network namespaces of its own:
// whatever happens to either, all that was started ends with the child.
package overhead

import (
	"fmt"
	"io"
	"math"
	"slices"
	"text/tabwriter"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/openatoll/atoll/spherelet/resources"
	"github.com/openatoll/atoll/supervisor/runtimeclass"
)

const (
	mib = 1 << 20
	gib = 1 << 30

	// idleTime is for how long the CPU time of idle VMs is taken.
	idleTime = 10 * time.Second
	// roundMemory and roundCPU are what the overhead is rounded up to.
	roundMemory = 8 * mib
	roundCPU    = 5 // millicores
)

// workloads (bytes) are what containers of the measured VMs may use; the second
// is a container's that names nothing, and the last is of the largest VMs that
// are cloned.
var workloads = []int64{resources.MinWorkload, resources.DefaultMemory, 768 * mib}

// A Sample is one VM, idle. Sizes are in bytes.
type Sample struct {
	Workload int64 `json:"workload"` // meant for containers
	Memory   int64 `json:"memory"`   // the VM's RAM
	Cloned   bool  `json:"cloned"`
	// Why it was booted and not cloned.
	Why string `json:"why,omitempty"`
	// QEMU is the proportional memory of the process beside the guest's RAM;
	// Guest is what the guest has of its RAM for itself on this host, and
	// Shared what it has in common with its template.
	QEMU   int64 `json:"qemu"`
	Guest  int64 `json:"guest"`
	Shared int64 `json:"shared"`
	// Kept is the part of Memory that containers cannot have.
	Kept int64 `json:"kept"`
	// CPU is used while idle, in millicores.
	CPU float64 `json:"cpu"`
}

// Host is what the VM costs the host.
func (s Sample) Host() int64 { return s.QEMU + s.Guest }

// A Report is what was found.
type Report struct {
	Samples     []Sample `json:"samples"`
	Accelerator string   `json:"accelerator"`
	Guest       string   `json:"guest"`
	// Measurement is what the RuntimeClass gets.
	runtimeclass.Measurement `json:"measurement"`
}

// A line is a + b·x.
type line struct{ a, b float64 }

// fit is the line of least squares; what is measured with noise grows with x or
// not at all.
func fit(x, y []float64) line {
	n := float64(len(x))
	var sx, sy, sxx, sxy float64
	for i := range x {
		sx, sy, sxx, sxy = sx+x[i], sy+y[i], sxx+x[i]*x[i], sxy+x[i]*y[i]
	}
	d := n*sxx - sx*sx
	if d == 0 {
		return line{a: sy / n}
	}
	l := line{b: (n*sxy - sx*sy) / d}
	if l.b <= 0 {
		return line{a: sy / n}
	}
	l.a = (sy - l.b*sx) / n
	return l
}

func (l line) at(x float64) float64 { return l.a + l.b*x }

// summarize finds the parts that are fixed and those that grow. The overhead is
// that of a VM for one container that names nothing: a RuntimeClass has one
// number for pods of all sizes.
func (r *Report) summarize(now time.Time) {
	var ram, host, kept []float64
	var cpu float64
	cloned := false
	for _, s := range r.like() {
		ram, host, kept = append(ram, float64(s.Memory)), append(host, float64(s.Host())), append(kept, float64(s.Kept))
		cpu = max(cpu, s.CPU)
		cloned = s.Cloned
	}
	h, k := fit(ram, host), fit(ram, kept)
	usual := float64(resources.DefaultMemory + resources.GuestShare(resources.DefaultMemory))
	r.Measurement = runtimeclass.Measurement{
		Overhead: runtimeclass.Overhead{
			MilliCPU: roundUp(int64(math.Ceil(cpu)), roundCPU),
			Memory:   roundUp(int64(h.at(usual)), roundMemory),
		},
		Time: metav1.NewTime(now.UTC().Truncate(time.Second)), Accelerator: r.Accelerator, Guest: r.Guest, Cloned: cloned,
		HostFixed: int64(h.a), HostGiB: int64(h.b * gib), GuestFixed: int64(k.a), GuestGiB: int64(k.b * gib),
	}
}

func roundUp(n, unit int64) int64 { return max((n+unit-1)/unit, 1) * unit }

// like are the samples that tell of VMs as most will be: cloned, if any were.
func (r *Report) like() []Sample {
	cloned := slices.DeleteFunc(slices.Clone(r.Samples), func(s Sample) bool { return !s.Cloned })
	if len(cloned) == 0 {
		return r.Samples
	}
	return cloned
}

// Short are the samples whose guest keeps more of its RAM than VMs get for it:
// containers of such pods could not use all that they named.
func (r *Report) Short() []Sample {
	return slices.DeleteFunc(slices.Clone(r.Samples), func(s Sample) bool {
		return s.Kept <= max(resources.GuestShare(s.Workload), r.Memory)
	})
}

// Table shows the report to people.
func (r *Report) Table(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "for containers\tVM's RAM\tstart\tQEMU\tguest\tcosts host\tof template\tguest keeps\tidle CPU\t")
	for _, s := range r.Samples {
		fmt.Fprintf(t, "%d MiB\t%d\t%s\t%d\t%d\t%d\t%d\t%d of %d\t%.1fm\t\n", s.Workload/mib, s.Memory/mib, map[bool]string{true: "clone", false: "boot"}[s.Cloned], s.QEMU/mib, s.Guest/mib, s.Host()/mib,
			s.Shared/mib, s.Kept/mib, resources.GuestShare(s.Workload)/mib, s.CPU)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(w, "\nBy %s, guest kernel %s, %s. In MiB, and MiB a GiB of RAM:\n", r.Accelerator, r.Guest,
		map[bool]string{true: "VMs that are cloned", false: "VMs that are booted"}[r.Cloned])
	fmt.Fprintf(w, "  costs the host  %4d + %d\n  guest keeps     %4d + %d\n", r.HostFixed/mib, r.HostGiB/mib, r.GuestFixed/mib, r.GuestGiB/mib)
	for _, s := range r.Samples {
		if s.Why != "" {
			fmt.Fprintf(w, "WARN  a VM of %d MiB was booted: %s\n", s.Memory/mib, s.Why)
		}
	}
	for _, s := range r.Short() {
		fmt.Fprintf(w, "WARN  of %d MiB for containers the guest keeps %d: give containers more memory than they need\n", s.Workload/mib, (s.Kept-resources.GuestShare(s.Workload))/mib)
	}
	_, err := fmt.Fprintf(w, "overhead of a pod with one container of %d MiB: cpu %dm, memory %d MiB\n", int64(resources.DefaultMemory/mib), r.MilliCPU, r.Memory/mib)
	return err
}
