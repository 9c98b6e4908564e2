package controllers

import (
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	storagehelpers "k8s.io/component-helpers/storage/volume"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// A refusing node's claim is tried, with the time going on.
type refusing struct {
	*provisioner
	driver *driver
	claim  *corev1.PersistentVolumeClaim
	class  *storagev1.StorageClass
}

func newRefusing(t *testing.T, change func(*refusing)) *refusing {
	t.Helper()
	mode := storagev1.VolumeBindingWaitForFirstConsumer
	r := &refusing{driver: &driver{}, claim: claimOf("64Mi", ""), class: &storagev1.StorageClass{VolumeBindingMode: &mode}}
	r.claim.ResourceVersion = "7"
	change(r)
	r.provisioner = &provisioner{newGroup(t, r.driver, r.claim, nil)}
	return r
}

// attempt tells whether the driver was asked, and what the claim then says.
func (r *refusing) attempt(t *testing.T, code codes.Code) (asked bool, said *corev1.PersistentVolumeClaimCondition) {
	t.Helper()
	r.driver.created, r.driver.err = nil, nil
	if code != codes.OK {
		r.driver.err = status.Error(code, "why")
	}
	_, _, err := r.Provision(t.Context(), controller.ProvisionOptions{PVC: r.claim, PVName: "pvc-c-uid", StorageClass: r.class})
	if asked = r.driver.created != nil; !asked && !ignored(err) {
		t.Errorf("neither asked nor left to the scheduler: %v", err)
	}
	claim := r.now(t)
	for i := range claim.Status.Conditions {
		if claim.Status.Conditions[i].Type == v1alpha1.ClaimRefused {
			said = &claim.Status.Conditions[i]
		}
	}
	return asked, said
}

func (r *refusing) now(t *testing.T) *corev1.PersistentVolumeClaim {
	t.Helper()
	claim, err := r.client.CoreV1().PersistentVolumeClaims("ns").Get(t.Context(), "data", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return claim
}

// A node that is full gives a claim back, and makes nothing of it until the
// scheduler has selected again.
func TestRefused(t *testing.T) {
	r := newRefusing(t, func(*refusing) {})
	asked, said := r.attempt(t, codes.ResourceExhausted)
	if !asked || said == nil || said.Status != corev1.ConditionTrue || said.Reason != reasonNoRoom || said.Message != "node n1: why" {
		t.Fatalf("asked %v, condition %+v", asked, said)
	}
	if asked, _ := r.attempt(t, codes.OK); asked {
		t.Error("a claim whose condition the cache does not have yet is tried again")
	}
	refused := r.now(t)
	r.claim, r.refusals = refused, newRefusals(r.group) // as after a restart
	if asked, _ := r.attempt(t, codes.OK); asked {
		t.Error("a claim with the condition is tried again")
	}
	r.claim = refused.DeepCopy()
	r.claim.Status.Conditions = nil
	if asked, _ := r.attempt(t, codes.OK); !asked {
		t.Error("a claim that was selected for the node once more is not tried")
	}
}

func TestRefusedOnlyWhatOthersMightMake(t *testing.T) {
	immediate := storagev1.VolumeBindingImmediate
	for name, tt := range map[string]struct {
		code   codes.Code
		change func(*refusing)
	}{
		"bound at once":    {codes.ResourceExhausted, func(r *refusing) { r.class.VolumeBindingMode = &immediate }},
		"of a source":      {codes.ResourceExhausted, func(r *refusing) { r.claim.Spec.DataSourceRef = &corev1.TypedObjectReference{Kind: "Book", Name: "b"} }},
		"nonsense":         {codes.InvalidArgument, func(*refusing) {}},
		"perhaps made":     {codes.DeadlineExceeded, func(*refusing) {}},
		"away for a blink": {codes.Unavailable, func(*refusing) {}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRefusing(t, tt.change)
			if _, said := r.attempt(t, tt.code); said != nil {
				t.Errorf("condition %+v", said)
			}
		})
	}
}

// A datastore that stays away has its claims given back.
func TestRefusedWhenLost(t *testing.T) {
	r, now := newRefusing(t, func(*refusing) {}), time.Now()
	r.refusals.now = func() time.Time { return now }
	for _, step := range []struct {
		after time.Duration
		code  codes.Code
	}{{0, codes.Unavailable}, {lostAfter - 1, codes.Unavailable}, {2, codes.DeadlineExceeded}, {0, codes.Unavailable}, {lostAfter - 1, codes.Unavailable}} {
		now = now.Add(step.after)
		if _, said := r.attempt(t, step.code); said != nil {
			t.Fatalf("given back too early: %+v", said)
		}
	}
	now = now.Add(1)
	if _, said := r.attempt(t, codes.Unavailable); said == nil || said.Reason != reasonLost {
		t.Errorf("condition %+v", said)
	}
}

// What is another node's is not remembered.
func TestRefusalForgotten(t *testing.T) {
	r := newRefusing(t, func(*refusing) {})
	r.attempt(t, codes.ResourceExhausted)
	r.claim.Annotations[storagehelpers.AnnSelectedNode] = "n2"
	if r.ShouldProvision(t.Context(), r.claim) || len(r.refusals.of) != 0 {
		t.Errorf("remembered %v", r.refusals.of)
	}
}
