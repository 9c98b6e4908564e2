package controllers

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	snapshotfake "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned/fake"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/record"
)

// A content without a node is taken where its snapshot or volume is, and left
// alone elsewhere.
func TestAdopt(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*snapshotv1.VolumeSnapshotContent, *driver)
		taken  bool
	}{
		"its snapshot is here": {func(c *snapshotv1.VolumeSnapshotContent, d *driver) {
			c.Status, c.Spec.Source = nil, snapshotv1.VolumeSnapshotContentSource{SnapshotHandle: ptr("s-1")}
		}, true},
		"its volume is here": {func(c *snapshotv1.VolumeSnapshotContent, d *driver) { c.Status = nil }, true},
		"its node left":      {func(*snapshotv1.VolumeSnapshotContent, *driver) {}, true},
		"its snapshot is elsewhere": {func(c *snapshotv1.VolumeSnapshotContent, d *driver) {
			d.snapshots = nil
		}, false},
		"its volume is elsewhere": {func(c *snapshotv1.VolumeSnapshotContent, d *driver) {
			c.Status, c.Spec.Source.VolumeHandle = nil, ptr("other")
		}, false},
		"nobody knows": {func(c *snapshotv1.VolumeSnapshotContent, d *driver) {
			d.err = status.Error(codes.Unavailable, "the datastore is away")
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			_, c := snapshotOf()
			c.Labels = nil
			d := &driver{snapshots: map[string]*csi.Snapshot{"s-1": {SnapshotId: "s-1"}}}
			tt.change(c, d)
			client := snapshotfake.NewSimpleClientset(c)
			g := newGroup(t, d, nil, nil)
			g.snapshots = client.SnapshotV1()
			s := newSnapshotting(g, client, g.NodeName)
			if err := s.adopter.informer.GetStore().Add(c); err != nil {
				t.Fatal(err)
			}
			err := s.adopter.adopt(t.Context(), "content")
			if (err != nil) != (d.err != nil) {
				t.Fatal(err)
			}
			got, err := g.snapshots.VolumeSnapshotContents().Get(t.Context(), "content", metav1.GetOptions{})
			if err != nil || (got.Labels[ContentKeeper] == "n1") != tt.taken {
				t.Errorf("labels %v, %v", got.Labels, err)
			}
		})
	}
}

// elsewhere is a scope that is no node's.
type elsewhere struct {
	Scope // the questions that no test asks
	whose Ownership
	names []string // Keeper's answers, the last for good
}

func (e *elsewhere) Keeper(context.Context) (string, error) {
	name := e.names[0]
	if len(e.names) > 1 {
		e.names = e.names[1:]
	}
	if name == "" {
		return "", errors.New("vCenter does not answer")
	}
	return name, nil
}

func (e *elsewhere) Content(*snapshotv1.VolumeSnapshotContent) Ownership { return e.whose }

// The supervisor takes what is vCenter's from whoever has been given it, asks where
// nobody knows, and says when it gets no answer.
func TestAdoptInVCenter(t *testing.T) {
	for name, tt := range map[string]struct {
		whose  Ownership
		err    error
		age    time.Duration
		taken  bool
		unsure bool
	}{
		"ours, whatever the driver says": {whose: Ours, err: errors.New("not asked"), taken: true},
		"a node's":                       {whose: Theirs},
		"in vCenter":                     {whose: Whoever, taken: true},
		"away, and new":                  {whose: Whoever, err: status.Error(codes.Unavailable, "no answer")},
		"away":                           {whose: Whoever, err: status.Error(codes.Unavailable, "no answer"), age: time.Minute, unsure: true},
	} {
		t.Run(name, func(t *testing.T) {
			_, c := snapshotOf()
			c.CreationTimestamp = metav1.NewTime(time.Now().Add(-tt.age))
			client := snapshotfake.NewSimpleClientset(c)
			g := newGroup(t, &driver{err: tt.err, snapshots: map[string]*csi.Snapshot{"s-1": {SnapshotId: "s-1"}}}, nil, nil)
			g.NodeName, g.scope, g.snapshots = "", &elsewhere{whose: tt.whose}, client.SnapshotV1()
			s := newSnapshotting(g, client, "vCenter.uuid")
			if err := s.adopter.informer.GetStore().Add(c); err != nil {
				t.Fatal(err)
			}
			if err := s.adopter.adopt(t.Context(), "content"); (err != nil) != (tt.whose == Whoever && tt.err != nil) {
				t.Error(err)
			}
			got, err := g.snapshots.VolumeSnapshotContents().Get(t.Context(), "content", metav1.GetOptions{})
			if err != nil || (got.Labels[ContentKeeper] == "vCenter.uuid") != tt.taken {
				t.Errorf("labels %v, %v", got.Labels, err)
			}
			events := g.events.(*record.FakeRecorder).Events
			if (len(events) == 2) != tt.unsure {
				t.Fatalf("%d events", len(events))
			}
			if tt.unsure {
				if e := <-events; !strings.Contains(e, "SnapshotUnknown") || !strings.Contains(e, "no answer") {
					t.Error(e)
				}
			}
		})
	}
}

// What vCenter does not answer is no snapshot that is gone.
func TestRestoreInVCenter(t *testing.T) {
	for name, tt := range map[string]struct {
		keeper string
		err    error
		want   string
	}{
		"away":     {"vCenter.uuid", status.Error(codes.Unavailable, "no answer"), "whether vCenter has VolumeSnapshot snap is not known, which is asked again: no answer"},
		"gone":     {"vCenter.uuid", nil, "is not found in vCenter: if it was deleted there"},
		"a node's": {"n1", nil, `is on node "n1", not in vCenter: name the StorageClass`},
	} {
		t.Run(name, func(t *testing.T) {
			s, c := snapshotOf()
			c.Labels[ContentKeeper] = tt.keeper
			p := &provisioner{newGroup(t, &driver{err: tt.err}, nil, nil)}
			p.NodeName = ""
			if err := p.fits(t.Context(), claimOf("64Mi", ""), s, c); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q in it", err, tt.want)
			}
		})
	}
}

// Calls are made for the keeper that the controllers began with, while they run, and
// to no other's back end.
func TestSnapshotCallsOfAnotherKeeper(t *testing.T) {
	const first, second = "vCenter.one", "vCenter.two"
	_, c := snapshotOf()
	d := &driver{}
	g := newGroup(t, d, nil, nil)
	e := &elsewhere{names: []string{first}}
	g.scope = e
	calls := newSnapshotting(g, snapshotfake.NewSimpleClientset(c), first).calls
	take := func() error {
		_, _, _, _, _, err := calls.CreateSnapshot(t.Context(), "name", "id", nil, nil)
		return err
	}
	if err := take(); status.Code(err) != codes.Unavailable || d.snapshots != nil {
		t.Errorf("before run: %v", err)
	}
	ctx, stop := context.WithCancel(t.Context())
	calls.begin(ctx, stop)
	if err := take(); err != nil || d.snapshots == nil {
		t.Errorf("as it runs: %v", err)
	}
	d.snapshots, e.names = nil, []string{""}
	if err := take(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "does not answer") || ctx.Err() != nil {
		t.Errorf("not known: %v", err)
	}
	e.names = []string{second}
	if err := take(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), second) || ctx.Err() == nil || d.snapshots != nil {
		t.Errorf("another: %v", err)
	}
	calls.end()
	e.names = []string{first}
	if err := take(); status.Code(err) != codes.Unavailable || d.snapshots != nil {
		t.Errorf("after run: %v", err)
	}
}

// A datastore that is full takes no snapshot, and that is final.
func TestSnapshotWithoutRoom(t *testing.T) {
	_, c := snapshotOf()
	g := newGroup(t, &driver{err: status.Error(codes.ResourceExhausted, "the datastore is full")}, nil, nil)
	calls := newSnapshotting(g, snapshotfake.NewSimpleClientset(c), g.NodeName).calls
	calls.begin(t.Context(), func() {})
	if _, _, _, _, _, err := calls.CreateSnapshot(t.Context(), "name", "id", nil, nil); status.Code(err) != codes.FailedPrecondition || err.Error() != "the datastore is full" {
		t.Errorf("%v, which upstream does not take for final", err)
	}
}

// Why a snapshot is not deleted is said on its content and its VolumeSnapshot.
func TestDeletionThatFailsIsTold(t *testing.T) {
	_, c := snapshotOf()
	g := newGroup(t, &driver{err: status.Error(codes.Unavailable, "no answer")}, nil, nil)
	s := newSnapshotting(g, snapshotfake.NewSimpleClientset(c), g.NodeName)
	if err := s.mine.Snapshot().V1().VolumeSnapshotContents().Informer().GetStore().Add(c); err != nil {
		t.Fatal(err)
	}
	s.calls.begin(t.Context(), func() {})
	if err := s.calls.DeleteSnapshot(t.Context(), "s-1", nil); err == nil {
		t.Error("it succeeds")
	}
	events := g.events.(*record.FakeRecorder).Events
	for range 2 {
		if e := <-events; !strings.Contains(e, "SnapshotDeleteFailed no answer") {
			t.Error(e)
		}
	}
}
