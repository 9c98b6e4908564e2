package cri

import (
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
)

// settle is how long a directory must be quiet before it is sent: upstream's
// atomic writer makes several changes in a row.
const settle = 100 * time.Millisecond

// dataLink is the link that upstream's atomic writer swaps to publish.
const dataLink = "..data"

// A treeWatcher follows the host directories of all volumes with one inotify
// instance and refreshes the guests' copies.
type treeWatcher struct {
	s *Server
	w *fsnotify.Watcher

	mu      sync.Mutex
	volumes map[string]*liveVolume // by directory
	timers  map[string]*time.Timer
	closed  bool
}

func newTreeWatcher(s *Server) (*treeWatcher, error) {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, step("watch volumes (inotify)", err)
	}
	t := &treeWatcher{s: s, w: w, volumes: map[string]*liveVolume{}, timers: map[string]*time.Timer{}}
	s.background.Go(t.run)
	return t, nil
}

func (t *treeWatcher) add(v *liveVolume) error {
	dir := v.volume.HostPath
	t.mu.Lock()
	t.volumes[dir] = v
	t.mu.Unlock()
	if err := t.w.Add(dir); err != nil {
		t.drop(v)
		return step("watch "+dir+" (inotify; see fs.inotify.max_user_watches)", err)
	}
	return nil
}

func (t *treeWatcher) drop(v *liveVolume) {
	dir := v.volume.HostPath
	t.mu.Lock()
	known := t.volumes[dir] == v
	if known {
		delete(t.volumes, dir)
		if timer := t.timers[dir]; timer != nil {
			timer.Stop()
			delete(t.timers, dir)
		}
	}
	t.mu.Unlock()
	if known {
		_ = t.w.Remove(dir) // fails when the kubelet has removed the directory: as well
	}
}

func (t *treeWatcher) run() {
	for {
		select {
		case e, ok := <-t.w.Events:
			if !ok {
				return
			}
			if filepath.Base(e.Name) == dataLink && e.Op&(fsnotify.Create|fsnotify.Rename) != 0 {
				t.changed(filepath.Dir(e.Name))
			}
		case err, ok := <-t.w.Errors:
			if !ok {
				return
			}
			t.s.log.Warn("watching volumes: events were lost, sending all again", "err", err)
			t.mu.Lock()
			dirs := make([]string, 0, len(t.volumes))
			for dir := range t.volumes {
				dirs = append(dirs, dir)
			}
			t.mu.Unlock()
			for _, dir := range dirs {
				t.changed(dir)
			}
		}
	}
}

func (t *treeWatcher) changed(dir string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	v := t.volumes[dir]
	if v == nil || t.closed {
		return
	}
	if timer := t.timers[dir]; timer != nil {
		timer.Reset(settle)
		return
	}
	t.timers[dir] = time.AfterFunc(settle, func() {
		t.mu.Lock()
		delete(t.timers, dir)
		gone := t.volumes[dir] != v || t.closed
		if !gone {
			t.s.background.Add(1)
		}
		t.mu.Unlock()
		if !gone {
			defer t.s.background.Done()
			v.refresh()
		}
	})
}

func (t *treeWatcher) close() {
	t.mu.Lock()
	t.closed = true
	for _, timer := range t.timers {
		timer.Stop()
	}
	t.mu.Unlock()
	t.w.Close()
}
