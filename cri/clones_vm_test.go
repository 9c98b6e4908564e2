package cri

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/qemu"
)

// inCommon lists what the probe of podinit's tests prints and no two pods may
// share; how each is found out is said there.
var inCommon = []string{"urandom", "tls", "boot_id", "machine", "product", "mac", "hostname", "at_random", "stack", "ports"}

// TestRealClones runs pods that are clones of one template, a few at a time, as
// the kubelet would, and compares what the first process of each has drawn and
// seen. ATOLL_TEST_CLONES is how many.
func TestRealClones(t *testing.T) {
	clones, atOnce := 4, 2
	if s := os.Getenv("ATOLL_TEST_CLONES"); s != "" {
		clones, _ = strconv.Atoi(s)
	}
	const memory = 128 * mib
	h := newRealHost(t, func(c *qemu.Config) {
		c.Templates = qemu.Templates{Enabled: true, Sizes: []qemu.Size{{CPUs: 1, Memory: memory}}}
	})
	image := pushBusybox(t, probeProgram(t), program{name: "etc/machine-id"})
	s := h.serve(t)
	if _, err := s.img.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: image}}); err != nil {
		t.Fatal(err)
	}
	eventuallyWithin(t, 5*time.Minute, "a template", func() bool {
		all, off := h.driver.TemplateStatus()
		if off != "" {
			t.Fatalf("there are no templates: %s", off)
		}
		return len(all) == 1 && all[0].State == "Ready"
	})
	seen := make([]map[string]any, clones)
	for first := 0; first < clones && !t.Failed(); first += atOnce {
		var wg sync.WaitGroup
		for n := first; n < min(first+atOnce, clones); n++ {
			wg.Go(func() { seen[n] = s.probe(t, n, image, memory) })
		}
		wg.Wait()
	}
	if t.Failed() {
		return
	}
	for n, a := range seen {
		for before, b := range seen[:n] {
			for _, what := range inCommon {
				if a[what] == b[what] && !strings.Contains(fmt.Sprint(a[what]), "no such file") {
					t.Errorf("pods %d and %d have in common: %s (%v)", before, n, what, a[what])
				}
			}
		}
	}
	kinds := map[string]uint64{}
	for _, l := range h.driver.Launches() {
		kinds[l.Kind+l.Reason] += l.Count
	}
	if len(kinds) != 1 || kinds["clone"] != uint64(clones) {
		t.Errorf("the pods were started as %v: nothing is known of clones", kinds)
	}
	t.Logf("%v: %v", kinds, seen[0])
	if left := h.left(t); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func eventuallyWithin(t *testing.T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// probeProgram builds the probe.
func probeProgram(t *testing.T) program {
	t.Helper()
	out := filepath.Join(t.TempDir(), "probe")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", out, "../vmpod/podinit/testdata/probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return program{"bin/probe", b}
}

// probe runs the n-th pod, whose first process is the probe, and removes it. A
// later container and an exec must see the same VM.
func (s *testServer) probe(t *testing.T, n int, image string, memory int64) (seen map[string]any) {
	uid := uuid.NewString()
	config := podConfig(s.dir)
	config.Metadata.Uid, config.Metadata.Name, config.Labels[kubeletUIDLabel] = uid, fmt.Sprintf("web-%d", n), uid
	config.Hostname, config.LogDirectory = config.Metadata.Name, filepath.Join(s.dir, "logs", uid)
	s.Prepare(t.Context(), vmpod.Hint{Owner: vmpod.Owner{PodUID: uid, Namespace: "default", Name: config.Metadata.Name}, CPUs: 1, Memory: memory, Images: []string{image}})
	r, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: config})
	if err != nil {
		t.Error(err)
		return nil
	}
	create := func(name string, command ...string) (id string) {
		c := ctrConfig(name)
		c.Image.Image, c.Command = image, command
		c.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"NET_ADMIN"}}
		resp, err := s.rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: r.PodSandboxId, Config: c, SandboxConfig: config})
		if err == nil {
			id = resp.ContainerId
			_, err = s.rt.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: id})
		}
		if err != nil {
			t.Error(err)
		}
		return id
	}
	started := time.Now()
	create("first", "/bin/probe")
	var line string
	eventuallyWithin(t, 2*time.Minute, "the probe's line", func() bool {
		b, _ := os.ReadFile(filepath.Join(config.LogDirectory, "first/0.log"))
		line = string(b)
		return strings.HasSuffix(line, "}\n") || t.Failed()
	})
	if err := json.Unmarshal([]byte(line[max(strings.Index(line, "{"), 0):]), &seen); err != nil {
		t.Errorf("%v: %s", err, line)
		return nil
	}
	now, _ := seen["now"].(float64)
	if at := time.Unix(0, int64(now)); at.Before(started.Add(-time.Second)) || at.After(time.Now().Add(time.Second)) {
		t.Errorf("pod %d began at %v by its clock, and after %v by the host's", n, at, started)
	}
	later := create("later", "sleep", "1000")
	said := s.exec(t, later, "sh", "-c", "cat /proc/sys/kernel/random/boot_id /etc/machine-id; hostname")
	if want := fmt.Sprintf("%s\n%s\n%s\n", seen["boot_id"], seen["machine"], seen["hostname"]); said != want {
		t.Errorf("pod %d: a later container sees\n%s, the first one saw\n%s", n, said, want)
	}
	if _, err := s.rt.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: r.PodSandboxId}); err != nil {
		t.Error(err)
	}
	if _, err := s.rt.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: r.PodSandboxId}); err != nil {
		t.Error(err)
	}
	return seen
}
