package main

import (
	"os"
	"path/filepath"
	"testing"
)

// What upstream's benchmarks and spherelet's log say becomes figures.
func TestUpstreamFigures(t *testing.T) {
	dir := t.TempDir()
	samples, log := filepath.Join(dir, "samples.json"), filepath.Join(dir, "log")
	for file, text := range map[string]string{
		samples: `{"operationsNames": ["CreateContainer", "StartContainer"], "numParallel": 1, "datapoints": [
			{"sampleIndex": 0, "operationsDurationsNs": [2000000, 40000000]}, {"sampleIndex": 1, "operationsDurationsNs": [4000000, 60000000]}]}`,
		log: `time=x level=DEBUG msg="CRI call" rpc=StartContainer took=40ms guest=38.5ms
time=x level=INFO msg="something else"
time=x level=DEBUG msg="CRI call" rpc=StartContainer took=60ms guest=1.5s
`,
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	guest, err := guestTimes(log)
	if err != nil {
		t.Fatal(err)
	}
	var all results
	if err := addUpstream(samples, upstreamFiles[1].operations, guest, &all); err != nil {
		t.Fatal(err)
	}
	if len(all) != 2 || all[0].Name != "cri_create_container" || all[0].Median != 3 || all[1].Median != 50 || all[1].P90 != 58 {
		t.Errorf("figures: %+v", all)
	}
	if all[1].Guest != 769.25 || all[1].Beside != "containerd and runc 40/48" {
		t.Errorf("start: %+v", all[1])
	}
}
