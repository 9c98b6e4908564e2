package spherelet

import (
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/volume"
)

// slowVolumes are mounted a while after they are first asked for.
type slowVolumes struct {
	after time.Duration
	begun time.Time
}

type namedVolume struct{ volume.Volume }

func (s *slowVolumes) ListVolumesForPod(types.UID) (map[string]volume.Volume, bool) {
	if s.begun.IsZero() {
		s.begun = time.Now()
	}
	have := map[string]volume.Volume{"first": namedVolume{}}
	if time.Since(s.begun) >= s.after {
		have["last"] = namedVolume{}
	}
	return have, true
}

func (*slowVolumes) ListBlockVolumesForPod(types.UID) (map[string]volume.BlockVolume, bool) {
	return nil, false
}

func TestAwaitVolumes(t *testing.T) {
	using := func(names ...string) *v1.Pod {
		c := v1.Container{}
		for _, n := range names {
			c.VolumeMounts = append(c.VolumeMounts, v1.VolumeMount{Name: n})
		}
		return &v1.Pod{Spec: v1.PodSpec{Containers: []v1.Container{c}, Volumes: []v1.Volume{{Name: "unused"}}}}
	}
	for _, tc := range []struct {
		name  string
		pod   *v1.Pod
		after time.Duration
		want  time.Duration
	}{
		{"no volumes", using(), time.Hour, 0},
		{"there already", using("first"), time.Hour, 0},
		{"as soon as they are there", using("first", "last"), 152 * time.Millisecond, 155 * time.Millisecond},
		{"no later than the kubelet looks", using("last"), time.Hour, volumesAtMost},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				awaitVolumes(&slowVolumes{after: tc.after}, tc.pod)
				if got := time.Since(start); got != tc.want {
					t.Errorf("returned after %s, want %s", got, tc.want)
				}
			})
		})
	}
}
