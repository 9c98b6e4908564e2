package vmdk

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/types"
)

// What was begun and not seen to end: by a process before this one, or by a
// call of this one whose answer was lost. A volume that does not exist yet may
// be what such a task is about to make, so that nobody makes a second one
// before these tasks have ended.

type past struct {
	mu      sync.Mutex
	settled bool            // what was before this process has ended
	doubt   map[string]bool // names of volumes whose creation was lost sight of
	mine    map[string]bool // tasks that calls of this process wait for
	turn    chan struct{}   // held by who waits for the past
}

func (p *past) init() {
	p.doubt, p.mine, p.turn = map[string]bool{}, map[string]bool{}, make(chan struct{}, 1)
}

func (p *past) began(task string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mine[task] = true
}

func (p *past) ended(task string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.mine, task)
}

func (p *past) lose(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.doubt[name] = true
}

func (p *past) unsure(name string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.settled || p.doubt[name]
}

// settle waits until no task of CNS's runs that this user started and no call
// of this process waits for. It tells whether it had to look.
func (d *Disks) settle(ctx context.Context, name string) (bool, error) {
	if !d.past.unsure(name) {
		return false, nil
	}
	select {
	case d.past.turn <- struct{}{}:
		defer func() { <-d.past.turn }()
	case <-ctx.Done():
		return false, wrap("wait for the tasks of CNS that were under way", ctx.Err())
	}
	if !d.past.unsure(name) {
		return true, nil
	}
	running, err := d.running(ctx)
	if err != nil {
		return false, wrap("look for tasks of CNS that were under way", err)
	}
	for _, id := range running {
		d.log.Info("a task that was begun before is waited for", "task", id, "volume", name)
		if _, err := d.tasks.Join(ctx, id); err != nil && ctx.Err() != nil {
			return false, wrap("wait for task "+id+", which was under way", err)
		} // how it ended, the volumes tell
	}
	d.past.mu.Lock()
	defer d.past.mu.Unlock()
	d.past.settled = true
	delete(d.past.doubt, name)
	return true, nil
}

// running are the ids of CNS's tasks that have not ended and are nobody's here.
func (d *Disks) running(ctx context.Context) ([]string, error) {
	if err := d.session.Login(ctx); err != nil {
		return nil, err
	}
	content := d.session.Client().ServiceContent
	if content.TaskManager == nil {
		return nil, fmt.Errorf("vCenter %s has no task manager: %w", d.session.Address(), errdefs.ErrUnavailable)
	}
	found, err := d.session.Retrieve(ctx, map[ref][]string{*content.TaskManager: {"recentTask"}})
	if err != nil {
		return nil, err
	}
	recent, _ := found[*content.TaskManager]["recentTask"].(types.ArrayOfManagedObjectReference)
	me := d.services.user()
	want := map[ref][]string{}
	for _, task := range recent.ManagedObjectReference {
		want[task] = []string{"info.state", "info.descriptionId", "info.name", "info.reason"}
	}
	if len(want) == 0 {
		return nil, nil
	}
	// One that vCenter forgets meanwhile has ended.
	if found, err = d.session.Retrieve(ctx, want); err != nil {
		return nil, err
	}
	var running []string
	for task, props := range found {
		info := taskInfo(props)
		if info.State != types.TaskInfoStateRunning && info.State != types.TaskInfoStateQueued || !ofCNS(info) {
			continue
		}
		if by, ok := info.Reason.(*types.TaskReasonUser); ok && me != "" && !strings.EqualFold(by.UserName, me) {
			continue
		}
		d.past.mu.Lock()
		mine := d.past.mine[task.Value]
		d.past.mu.Unlock()
		if !mine {
			running = append(running, task.Value)
		}
	}
	slices.Sort(running)
	return running, nil
}

func taskInfo(props map[string]types.AnyType) (info types.TaskInfo) {
	info.State, _ = props["info.state"].(types.TaskInfoState)
	info.DescriptionId, _ = props["info.descriptionId"].(string)
	info.Name, _ = props["info.name"].(string)
	switch by := props["info.reason"].(type) {
	case *types.TaskReasonUser:
		info.Reason = by
	case types.TaskReasonUser:
		info.Reason = &by
	}
	return info
}

// ofCNS tells a task of CNS's ("com.vmware.cns.tasks.createvolume") from others.
func ofCNS(info types.TaskInfo) bool {
	text := strings.ToLower(info.DescriptionId + " " + info.Name)
	return strings.Contains(text, "cns")
}
