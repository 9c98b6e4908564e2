package vsphere

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"
)

// A folders viewer knows folders by name.
type folders struct {
	mu       sync.Mutex
	byRef    map[types.ManagedObjectReference]string
	replaced int
	lost     []error
	changed  chan struct{}
}

func (f *folders) poke() {
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

func (f *folders) Replace(all []Update) {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.poke()
	f.byRef = map[types.ManagedObjectReference]string{}
	f.replaced++
	f.apply(all)
}

func (f *folders) Apply(changes []Update) {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.poke()
	f.apply(changes)
}

func (f *folders) apply(changes []Update) {
	for _, u := range changes {
		if u.Gone {
			delete(f.byRef, u.Object)
		} else if name, ok := u.Props["name"].(string); ok {
			f.byRef[u.Object] = name
		}
	}
}

func (f *folders) Lost(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.poke()
	f.lost = append(f.lost, err)
}

// until waits for the watch to show something.
func (f *folders) until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	late := time.After(time.Minute)
	for {
		f.mu.Lock()
		done := ok()
		f.mu.Unlock()
		if done {
			return
		}
		select {
		case <-f.changed:
		case <-late:
			t.Fatalf("the watch has not shown %s", what)
		}
	}
}

func startWatch(t *testing.T, s *Session) (*Watch, *folders) {
	t.Helper()
	f := &folders{changed: make(chan struct{}, 1)}
	w := NewWatch(s, WatchConfig{Types: map[string][]string{"Folder": {"name"}}}, f)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the watch ended with %v", err)
		}
	})
	f.until(t, "anything", func() bool { return f.replaced > 0 })
	return w, f
}

func createFolder(t *testing.T, s *Session, name string) types.ManagedObjectReference {
	t.Helper()
	if err := s.Login(t.Context()); err != nil {
		t.Fatal(err)
	}
	res, err := methods.CreateFolder(t.Context(), s, &types.CreateFolder{This: s.Client().ServiceContent.RootFolder, Name: name})
	if err != nil {
		t.Fatal(err)
	}
	return res.Returnval
}

func rename(s *Session, id types.ManagedObjectReference, name string) func(context.Context) (types.ManagedObjectReference, error) {
	return func(ctx context.Context) (types.ManagedObjectReference, error) {
		res, err := methods.Rename_Task(ctx, s, &types.Rename_Task{This: id, NewName: name})
		if err != nil {
			return types.ManagedObjectReference{}, err
		}
		return res.Returnval, nil
	}
}

func TestWatchAndTasks(t *testing.T) {
	v := startVCenter(t)
	var l ledger
	s := newSession(t, v.config(&l))
	w, f := startWatch(t, s)
	tasks := NewTasks(w)

	id := createFolder(t, s, "one")
	f.until(t, "the new folder", func() bool { return f.byRef[id] == "one" })
	var task string
	if _, err := tasks.Do(t.Context(), id, func(ctx context.Context) (types.ManagedObjectReference, error) {
		ref, err := rename(s, id, "two")(ctx)
		task = ref.Value
		return ref, err
	}); err != nil {
		t.Fatal(err)
	}
	f.until(t, "the new name", func() bool { return f.byRef[id] == "two" })
	if _, err := tasks.Join(t.Context(), task); err != nil {
		t.Errorf("joining a task that has ended well: %v", err)
	}

	createFolder(t, s, "taken")
	_, err := tasks.Do(t.Context(), id, rename(s, id, "taken"))
	mustBe(t, Error("rename", err), errdefs.ErrAlreadyExists, "taken")

	before := l.count("ModifyListView")
	seen := make(chan struct{})
	close(seen)
	if _, err := tasks.DoUnlessSeen(t.Context(), id, seen, rename(s, id, "three")); err != nil || l.count("ModifyListView") != before {
		t.Errorf("a task whose effect was seen: %v, and %d calls to hear of it, want none", err, l.count("ModifyListView")-before)
	}
	_, err = tasks.DoUnlessSeen(t.Context(), id, make(chan struct{}), rename(s, id, "taken"))
	mustBe(t, Error("rename", err), errdefs.ErrAlreadyExists, "taken")

	before = l.count("ModifyListView")
	var wg sync.WaitGroup
	for i := range 40 {
		other := createFolder(t, s, fmt.Sprint("many-", i))
		wg.Go(func() {
			if _, err := tasks.Do(t.Context(), other, rename(s, other, fmt.Sprint("renamed-", i))); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := l.count("ModifyListView") - before; n > 40 {
		t.Errorf("%d calls to hear of 40 tasks, want at most one each", n)
	}

	// The session goes while nobody calls: the watch comes back by itself, and
	// has seen what happened meanwhile.
	v.dropSessions(t)
	late := createFolder(t, newSession(t, v.config(nil)), "late")
	f.until(t, "what happened without it", func() bool { return f.byRef[late] == "late" && f.replaced > 1 })
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, err := range f.lost {
		if !errdefs.IsUnavailable(err) && !errdefs.IsAborted(err) {
			t.Errorf("the watch was lost with %v, want ErrUnavailable", err)
		}
	}
}

func TestTaskThatVCenterForgotIsUnknown(t *testing.T) {
	v := startVCenter(t)
	s := newSession(t, v.config(nil))
	w, _ := startWatch(t, s)
	tasks := NewTasks(w)
	_, err := tasks.Join(t.Context(), "task-404")
	mustBe(t, err, errdefs.ErrUnavailable, "how it ended is unknown")
}

func TestOneTaskAnObject(t *testing.T) {
	v := startVCenter(t)
	s := newSession(t, v.config(nil))
	w, _ := startWatch(t, s)
	tasks := NewTasks(w)
	id := createFolder(t, s, "busy")
	release, err := tasks.acquire(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err = tasks.Do(ctx, id, func(context.Context) (types.ManagedObjectReference, error) {
		t.Error("a second task on the object was started")
		return types.ManagedObjectReference{}, nil
	})
	mustBe(t, err, errdefs.ErrUnavailable, "none was started")
	release()
	if _, err := tasks.Do(t.Context(), id, rename(s, id, "free")); err != nil {
		t.Error(err)
	}
	for i := range maxTasks {
		if _, err := tasks.acquire(t.Context(), types.ManagedObjectReference{Type: "Folder", Value: fmt.Sprint(i)}); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel = context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := tasks.acquire(ctx, id); !errdefs.IsUnavailable(err) {
		t.Errorf("task %d at once: %v, want ErrUnavailable", maxTasks+1, err)
	}
}

// TestWatchFollowsTheSession has another login, as when another call found the
// session gone, while the watch's wait is not answered.
func TestWatchFollowsTheSession(t *testing.T) {
	v := startVCenter(t)
	s := newSession(t, v.config(nil))
	_, f := startWatch(t, s)
	s.mu.Lock()
	s.replace()
	s.newest, s.replace = context.WithCancel(t.Context())
	s.mu.Unlock()
	f.until(t, "the inventory anew, in the other session", func() bool { return f.replaced > 1 })
}

// A watch whose session was dropped logs in itself, which is no reason to begin
// once more.
func TestWatchLogsInAgain(t *testing.T) {
	v := startVCenter(t)
	s := newSession(t, v.config(nil))
	_, f := startWatch(t, s)
	v.dropSessions(t)
	f.until(t, "the inventory anew, in a new session", func() bool { return f.replaced > 1 })
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.lost) != 1 || s.Logins() != 2 {
		t.Errorf("lost %d times (%v), %d logins", len(f.lost), f.lost, s.Logins())
	}
}
