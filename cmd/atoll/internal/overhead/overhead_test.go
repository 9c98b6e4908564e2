package overhead

import (
	"bytes"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/openatoll/atoll/spherelet/resources"
)

func TestFit(t *testing.T) {
	for _, tt := range []struct {
		name string
		x, y []float64
		want line
	}{
		{"a line", []float64{1, 2, 4}, []float64{5, 7, 11}, line{3, 2}},
		{"noise about a line", []float64{0, 1, 2, 3}, []float64{1, 1, 3, 3}, line{0.8, 0.8}},
		{"what falls is flat", []float64{1, 2, 3}, []float64{9, 8, 7}, line{8, 0}},
		{"one point", []float64{5}, []float64{7}, line{7, 0}},
	} {
		got := fit(tt.x, tt.y)
		if math.Abs(got.a-tt.want.a) > 1e-9 || math.Abs(got.b-tt.want.b) > 1e-9 {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestParseSmaps(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("testdata", "smaps"))
	if err != nil {
		t.Fatal(err)
	}
	for cloned, own := range map[bool]int64{true: 30000, false: 30000 + 48} {
		got, err := parseSmaps(bytes.NewReader(text), cloned)
		if want := (split{guest: own << 10, shared: (100048 - own) << 10, rest: (4000 + 21 + 9000) << 10}); err != nil || got != want {
			t.Errorf("cloned %v: %+v, %v; want %+v", cloned, got, err, want)
		}
	}
}

func sample(workload, qemu, guest, kept int64, cpu float64) Sample {
	return Sample{Workload: workload, Memory: workload + resources.GuestShare(workload), Cloned: true, QEMU: qemu * mib, Guest: guest * mib, Kept: kept * mib, CPU: cpu}
}

func TestSummaryAndTable(t *testing.T) {
	r := &Report{Accelerator: "kvm", Guest: "6.1", Samples: []Sample{
		sample(128*mib, 20, 10, 100, 1.5), sample(512*mib, 20, 17, 120, 6.2), sample(768*mib, 20, 21, 300, 2), {Workload: 128 * mib, Memory: 308 * mib, QEMU: 100 * mib, Why: "no template"},
	}}
	r.summarize(time.Unix(1e9, 0))
	if r.Memory != 40*mib || r.MilliCPU != 10 {
		t.Errorf("overhead %d MiB, %dm; want 40 MiB and 10m", r.Memory/mib, r.MilliCPU)
	}
	if r.HostGiB/mib != 17 && r.HostGiB/mib != 18 {
		t.Errorf("a GiB costs %d MiB, want 17 or 18", r.HostGiB/mib)
	}
	if short := r.Short(); len(short) != 1 || short[0].Workload != 768*mib {
		t.Errorf("short of RAM: %v, want the last alone", short)
	}
	var out bytes.Buffer
	if err := r.Table(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"By kvm, guest kernel 6.1, VMs that are cloned", "308 MiB was booted: no template", "WARN  of 768 MiB", "120 of 188", "memory 40 MiB"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, &out)
		}
	}
}
