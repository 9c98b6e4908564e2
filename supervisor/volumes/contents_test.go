package volumes

import (
	"strings"
	"testing"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/record"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/storage/csi/controllers"
)

// TestContent: snapshots of this vCenter's disks are taken from whoever has been
// given them, those of another vCenter are told of and left alone, and where no
// PersistentVolume tells vCenter is asked.
func TestContent(t *testing.T) {
	at := &store{uuid: "here"}
	s := newScope(t, at)
	s.factory = controllers.NewFactory(s.client)
	for handle, vcenter := range map[string]string{"disk": "here", "far": "there", "local": ""} {
		pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: handle}, Spec: corev1.PersistentVolumeSpec{PersistentVolumeSource: corev1.PersistentVolumeSource{
			CSI: &corev1.CSIPersistentVolumeSource{Driver: v1alpha1.CSIDriverName, VolumeHandle: handle, VolumeAttributes: map[string]string{controllers.VCenterAttribute: vcenter}},
		}}}
		if err := s.factory.Core().V1().PersistentVolumes().Informer().GetStore().Add(pv); err != nil {
			t.Fatal(err)
		}
	}
	content := func(keeper, volume string) *snapshotv1.VolumeSnapshotContent {
		c := &snapshotv1.VolumeSnapshotContent{Spec: snapshotv1.VolumeSnapshotContentSpec{
			Driver: v1alpha1.CSIDriverName, VolumeSnapshotRef: corev1.ObjectReference{UID: "uid"}, Source: snapshotv1.VolumeSnapshotContentSource{VolumeHandle: &volume},
		}}
		if volume == "" {
			handle := "disk.snapshot"
			c.Spec.Source = snapshotv1.VolumeSnapshotContentSource{SnapshotHandle: &handle}
		}
		if keeper != "" {
			c.Labels = map[string]string{controllers.ContentKeeper: keeper}
		}
		return c
	}
	if got := s.Content(content("", "disk")); got != controllers.Theirs {
		t.Errorf("before vCenter was asked who it is: %v", got)
	}
	if keeper, err := s.Keeper(t.Context()); err != nil || keeper != "vCenter.here" {
		t.Fatalf("%q, %v", keeper, err)
	}
	for _, c := range []struct {
		keeper, volume string
		want           controllers.Ownership
		told           bool
	}{
		{"", "disk", controllers.Ours, false},
		{"esx", "disk", controllers.Ours, false},
		{"", "far", controllers.Theirs, true},
		{"vCenter.there", "", controllers.Theirs, true},
		{"", "local", controllers.Whoever, false},
		{"n1", "local", controllers.Theirs, false},
		{"n1", "", controllers.Theirs, false},
		{"", "", controllers.Whoever, false},
	} {
		got := s.Content(content(c.keeper, c.volume))
		events := s.events.(*record.FakeRecorder).Events
		if got != c.want || (len(events) == 2) != c.told {
			t.Errorf("%+v: %v, %d events", c, got, len(events))
		}
		for range len(events) {
			if e := <-events; !strings.Contains(e, "instance UUID there") || !strings.Contains(e, "(here)") {
				t.Error(e)
			}
		}
	}
	at.uuid = "changed"
	if keeper, err := s.Keeper(t.Context()); err != nil || keeper != "vCenter.changed" {
		t.Errorf("%q, %v", keeper, err)
	}
}
