package main

import (
	"encoding/json"
	"io"
	"os"
	"regexp"
	"slices"
	"testing"
	"time"
)

// figure makes one of 20 samples around a median.
func figure(name, unit string, median float64) *result {
	var rs results
	var samples []float64
	for i := range 20 {
		samples = append(samples, median*(0.95+0.1*float64(i)/19))
	}
	return rs.add(name, unit, samples)
}

func TestCompare(t *testing.T) {
	ratio := func(r *result, of string, ratio float64) *result {
		r.Of, r.Ratio = of, ratio
		return r
	}
	promise := func(r *result, ok bool) *result {
		r.Reach, r.OK = "<= 1 x", ok
		return r
	}
	atLeast := func(r *result) *result {
		r.least(100)
		return r
	}
	one := func(r *result) *result {
		r.Samples = r.Samples[:1]
		return r
	}
	for _, tc := range []struct {
		name     string
		old, now *result
		slower   float64 // what the machine does now, times before
		want     verdict
	}{
		{"the same", figure("f", "ms", 100), figure("f", "ms", 103), 1, same},
		{"slower", figure("f", "ms", 100), figure("f", "ms", 130), 1, worse},
		{"faster", figure("f", "ms", 100), figure("f", "ms", 70), 1, better},
		{"on a machine half as fast", figure("f", "ms", 100), figure("f", "ms", 200), 2, same},
		{"slower on a machine half as fast", figure("f", "ms", 100), figure("f", "ms", 260), 2, worse},
		{"ratio to another figure", ratio(figure("f", "ms", 100), "g", 1), ratio(figure("f", "ms", 100), "g", 1), 2, worse}, // g is slower too
		{"memory", figure("f", "MiB", 30), figure("f", "MiB", 40), 3, worse},
		{"throughput falls", figure("f", "MB/s", 100), figure("f", "MB/s", 60), 1, worse},
		{"throughput falls within noise", figure("f", "MB/s", 100), figure("f", "MB/s", 80), 1, same},
		{"fewer pods", atLeast(figure("f", "pods", 200)), atLeast(figure("f", "pods", 150)), 1, worse},
		{"more pods", atLeast(figure("f", "pods", 150)), atLeast(figure("f", "pods", 200)), 1, better},
		{"a promise broken within noise", promise(figure("f", "ms", 100), true), promise(figure("f", "ms", 105), false), 1, brokenBy},
		{"a promise kept again", promise(figure("f", "ms", 105), false), promise(figure("f", "ms", 100), true), 1, mended},
		{"one sample, within noise", one(figure("f", "x", 10)), one(figure("f", "x", 12)), 1, same},
		{"one sample, far off", one(figure("f", "x", 10)), one(figure("f", "x", 14)), 1, worse},
	} {
		t.Run(tc.name, func(t *testing.T) {
			old := results{*figure(yardstick, "ms", 1000), *figure("g", "ms", 100), *tc.old}
			now := results{*figure(yardstick, "ms", 1000*tc.slower), *figure("g", "ms", 100/tc.slower), *tc.now}
			changes := compare(old, now)
			if got := changes[2]; got.verdict != tc.want {
				t.Errorf("%s: %+.0f %% in %s, p=%.3f; want %s", got.verdict, got.by*100, got.in, got.p, tc.want)
			}
		})
	}
}

func TestCompareTellsOfRegressions(t *testing.T) {
	old := results{*figure("a", "MiB", 10), *figure("b", "MiB", 10), *figure("old", "MiB", 1)}
	now := results{*figure("a", "MiB", 10), *figure("b", "MiB", 20), *figure("new", "MiB", 1)}
	changes := compare(old, now)
	if bad := printChanges(io.Discard, changes); !slices.Equal(bad, []string{"b"}) {
		t.Errorf("regressions: %v; want b alone", bad)
	}
	if v := []verdict{changes[2].verdict, changes[3].verdict}; v[0] != onlyNow || v[1] != gone {
		t.Errorf("figures that are in one run only: %v", v)
	}
}

func TestMannWhitney(t *testing.T) {
	seq := func(from, to float64) (out []float64) {
		for v := from; v <= to; v++ {
			out = append(out, v)
		}
		return out
	}
	for _, tc := range []struct {
		name     string
		a, b     []float64
		from, to float64
	}{
		// By hand: U = 12.5 of 50, deviation 13.20, z = 2.80.
		{"shifted", seq(1, 10), seq(6, 15), 0.0050, 0.0052},
		{"apart", seq(1, 20), seq(101, 120), 0, 1e-6},
		{"equal", seq(1, 10), seq(1, 10), 0.99, 1},
		{"all the same", []float64{1, 1, 1}, []float64{1, 1, 1}, 1, 1},
	} {
		if p := mannWhitney(tc.a, tc.b); p < tc.from || p > tc.to {
			t.Errorf("%s: p = %g, want %g to %g", tc.name, p, tc.from, tc.to)
		}
	}
}

func TestLatest(t *testing.T) {
	at := func(day int, accelerator, flavour string) report {
		return report{Date: time.Date(2026, 1, day, 0, 0, 0, 0, time.UTC), Host: host{Accelerator: accelerator, GuestFlavour: flavour}}
	}
	runs := map[string]report{"old": at(1, "tcg", "stock"), "new": at(2, "tcg", "stock"), "tuned": at(3, "tcg", "tuned"), "kvm": at(4, "kvm", "stock")}
	if got := latest(runs, host{Accelerator: "tcg", GuestFlavour: "stock"}); got != "new" {
		t.Errorf("latest of tcg-stock is %q", got)
	}
	if got := latest(runs, host{Accelerator: "kvm", GuestFlavour: "tuned"}); got != "" {
		t.Errorf("latest of kvm-tuned is %q", got)
	}
}

// The file is sent to others: it must not say whose machine it is from.
func TestReportNamesNobody(t *testing.T) {
	h, err := describeHost(t.Context(), guestOfTest(t))
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(report{Format: reportFormat, Host: h, Figures: results{*figure("f", "ms", 1)}})
	if err != nil {
		t.Fatal(err)
	}
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	if re := regexp.MustCompile(`\b` + regexp.QuoteMeta(name) + `\b`); len(name) > 3 && re.Match(b) {
		t.Errorf("the report has the host's name %q: %s", name, b)
	}
	for what, re := range map[string]string{"a path": `"/`, "an address": `\d+\.\d+\.\d+\.\d+|[0-9a-f]{2}(:[0-9a-f]{2}){5}`, "an id": `[0-9a-f]{8}-[0-9a-f]{4}|[0-9a-f]{32}`} {
		if found := regexp.MustCompile(re).Find(b); found != nil {
			t.Errorf("the report has %s, %s: %s", what, found, b)
		}
	}
}

// guestOfTest makes a guest directory that is good enough to be described.
func guestOfTest(t *testing.T) string {
	dir := t.TempDir()
	for name, text := range map[string]string{"vmlinuz": "k", "initramfs": "i", "guest.json": `{"kernel":"6.1.0","flavour":"stock","hash":"h"}`} {
		if err := os.WriteFile(dir+"/"+name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
