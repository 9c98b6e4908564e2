package podmirror

import (
	"os"
	"strings"
	"testing"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// TestDocsNameWhatIsThere holds docs/pods-in-vsphere.md to the code.
func TestDocsNameWhatIsThere(t *testing.T) {
	b, err := os.ReadFile("../../docs/pods-in-vsphere.md")
	if err != nil {
		t.Fatal(err)
	}
	page := string(b)
	for _, name := range v1alpha1.PodVMAnnotations() {
		if !strings.Contains(page, "\n| `"+name+"` |") {
			t.Errorf("no row for annotation %s", name)
		}
	}
	for _, op := range []PowerOp{PowerOn, PowerOff, PowerReset, PowerSuspend, GuestShutdown, GuestReboot, GuestStandby, Destroy} {
		row := ""
		for line := range strings.Lines(page) {
			if asked, what, ok := strings.Cut(strings.TrimPrefix(line, "| "), " | "); ok && strings.Contains(asked, "`"+string(op)+"`") {
				row = what
			}
		}
		if row == "" || strings.HasPrefix(row, "refused") != (refusal(op) != "") {
			t.Errorf("%s: the page says %q, the code %q", op, row, refusal(op))
		}
	}
	for _, name := range []string{
		v1alpha1.AnnotationMemoryLimit, v1alpha1.AnnotationVMClassSizes, v1alpha1.AnnotationZones, v1alpha1.AnnotationStorageClasses,
		v1alpha1.LabelVMClass, v1alpha1.LabelNodeVMClass, AnnotationPod, AnnotationPodUID, AnnotationPodPhase,
		mirrors.FQName(), changesTotal.FQName(), reconcileSeconds.FQName(), powerRequests.FQName(),
	} {
		if !strings.Contains(page, "`"+name) {
			t.Errorf("%s is not on the page", name)
		}
	}
}
