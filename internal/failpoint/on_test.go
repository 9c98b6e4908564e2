//go:build failpoints

package failpoint

import (
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	m, err := parse("cri/run/launched=kill; tap/attach/tap-made@3=error*2;disk/create/linked=sleep(20ms)")
	if err != nil {
		t.Fatal(err)
	}
	for p, want := range map[Point]order{
		RunLaunched:   {action: kill, first: 1, count: 1},
		AttachTapMade: {action: fail, first: 3, count: 2},
		DiskLinked:    {action: sleep, first: 1, count: 1, pause: 20 * time.Millisecond},
	} {
		if m[p] != want {
			t.Errorf("%s: %+v, want %+v", p, m[p], want)
		}
	}
	for _, bad := range []string{"x", "no/such/point=kill", "cri/run/launched=explode", "cri/run/launched@0=kill", "cri/run/launched=error*0", "cri/run/launched=sleep(long)"} {
		if _, err := parse(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func TestErrCounts(t *testing.T) {
	t.Setenv(env, "tap/attach/tap-made@2=error*2")
	var got []bool
	for range 4 {
		got = append(got, Err(AttachTapMade) != nil)
	}
	if got[0] || !got[1] || !got[2] || got[3] {
		t.Errorf("failed at %v, want the second and the third hit", got)
	}
}
