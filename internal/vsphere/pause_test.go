package vsphere

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vmware/govmomi/vim25/types"
)

// Changes are let gather for 50 ms, and for 5 ms from when somebody waits for a
// task, which may be before the pause or amid it, and no longer than to its end.
func TestPause(t *testing.T) {
	task := types.ManagedObjectReference{Type: "Task", Value: "task-1"}
	for _, tc := range []struct {
		name         string
		waits        bool
		after, pause time.Duration
		want         time.Duration
	}{
		{name: "no pause", waits: true},
		{name: "no task", pause: gather, want: gather},
		{name: "a task before", waits: true, pause: gather, want: gatherTasks},
		{name: "a task amid", waits: true, after: 20 * time.Millisecond, pause: gather, want: 20*time.Millisecond + gatherTasks},
		{name: "a task near the end", waits: true, after: gather - time.Millisecond, pause: gather, want: gather},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := NewWatch(nil, WatchConfig{}, nil)
				if tc.waits && tc.after == 0 {
					w.task(t.Context(), task)
				} else if tc.waits {
					time.AfterFunc(tc.after, func() { w.task(context.Background(), task) })
				}
				start := time.Now()
				w.pause(t.Context(), tc.pause)
				if took := time.Since(start); took != tc.want {
					t.Errorf("paused for %v, want %v", took, tc.want)
				}
			})
		})
	}
}
