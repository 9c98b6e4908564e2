package spherelet

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/record"

	"github.com/openatoll/atoll/spherelet/volumes"
)

// TestSubPathTeller tells each failure once, until it is cured, another, or old.
func TestSubPathTeller(t *testing.T) {
	mounts := []v1.VolumeMount{{Name: "scratch"}, {Name: "data", SubPath: "logs"}}
	pod := &v1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "uid", Namespace: "ns", Name: "web"}, Spec: v1.PodSpec{
		InitContainers: []v1.Container{{Name: "init", VolumeMounts: mounts}}, Containers: []v1.Container{{Name: "main", VolumeMounts: mounts}}}}
	recorder := record.NewFakeRecorder(10)
	recorder.IncludeObject = true
	var log bytes.Buffer
	now := time.Now()
	teller := &subPathTeller{
		pods: func() []*v1.Pod { return []*v1.Pod{{}, pod} }, recorder: func() record.EventRecorder { return recorder },
		log: slog.New(slog.NewTextHandler(&log, nil)), now: func() time.Time { return now }, told: map[volumes.SubPath]toldSubPath{},
	}
	told := func() (all []string) {
		for {
			select {
			case e := <-recorder.Events:
				all = append(all, e)
			default:
				return all
			}
		}
	}
	use := volumes.SubPath{PodUID: "uid", Container: "main", Mount: 1, Volume: "pvc-1", Path: "logs"}
	out := errors.New(`sub-path "logs" leads out of the volume: use another`)
	for range 5 {
		teller.Failed(use, out)
	}
	got := told()
	if len(got) != 1 || !strings.HasPrefix(got[0], `Warning SubPathFailed Container "main", volume "data": sub-path "logs" leads out of the volume: use another involvedObject{kind=Pod,`) {
		t.Errorf("told %q", got)
	}
	for _, want := range []string{"pod_uid=uid", "namespace=ns", "pod=web", "container=main", "volume=data", "sub_path=logs", "leads out", "level=WARN"} {
		if strings.Count(log.String(), want) != 1 {
			t.Errorf("%s is not once in the log:\n%s", want, log.String())
		}
	}
	step := func(what string, want int, do func()) {
		t.Helper()
		if do(); len(told()) != want {
			t.Errorf("%s: want %d events", what, want)
		}
	}
	step("another failure", 1, func() { teller.Failed(use, errors.New("read-only")) })
	step("the first again", 1, func() { teller.Failed(use, out) })
	step("another container", 1, func() { u := use; u.Container = "init"; teller.Failed(u, out) })
	step("old", 1, func() { now = now.Add(retellSubPath); teller.Failed(use, out) })
	step("cured, and broken again", 1, func() { teller.Prepared(use); teller.Failed(use, out) })
	step("not news", 0, func() { teller.Failed(use, out) })
	teller.Gone("uid", "other")
	teller.Gone("other", "pvc-1")
	step("others are gone", 0, func() { teller.Failed(use, out) })
	teller.Gone("uid", "pvc-1")
	if len(teller.told) != 0 {
		t.Errorf("kept of a pod that is gone: %v", teller.told)
	}
	step("a pod that the kubelet has forgotten", 0, func() { u := use; u.PodUID = "forgotten"; teller.Failed(u, out) })
	if !strings.Contains(log.String(), "pod_uid=forgotten") {
		t.Error("it is not in the log")
	}
	step("a text of any length", 1, func() { teller.Failed(use, errors.New(strings.Repeat("ä", 4000))) })
}
