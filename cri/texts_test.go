package cri

import (
	"strings"
	"testing"
	"unicode/utf8"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// What a guest says of an end fits a status: the API refuses what is not
// UTF-8, and then nothing of the pod can be told any more.
func TestGuestsTextsFit(t *testing.T) {
	for _, text := range []string{strings.Repeat("é", 4096), "x" + strings.Repeat("é", 4096), "\xff\xfe", "short"} {
		got := clip(text, 4096)
		if !utf8.ValidString(got) || len(got) > 4096+len("…") {
			t.Errorf("clip of %d bytes: %d bytes, valid %v", len(text), len(got), utf8.ValidString(got))
		}
	}
	c := &container{State: runtimeapi.ContainerState_CONTAINER_RUNNING}
	exited(c, &agentapi.ExitRecord{ExitCode: 1, Reason: strings.Repeat("R", 60000), TimeNs: 1 << 62})
	if c.Reason != "Error" {
		t.Errorf("a reason of %d bytes was taken", len(c.Reason))
	}
	exited(c, nil) // ended already: nothing is read
	c = &container{State: runtimeapi.ContainerState_CONTAINER_RUNNING}
	if exited(c, &agentapi.ExitRecord{Reason: "OOMKilled", ExitCode: 137}); c.Reason != "OOMKilled" {
		t.Errorf("reason %q", c.Reason)
	}
}
