package compliance

import (
	"maps"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/openatoll/atoll/api/v1alpha1"
)

func TestSync(t *testing.T) {
	const state, reason, other = v1alpha1.AnnotationPolicyCompliance, v1alpha1.AnnotationPolicyComplianceReason, "example.com/other"
	for name, tc := range map[string]struct {
		volume, claim, want map[string]string
		uid                 string
	}{
		"a breach":                {map[string]string{state: "NonCompliant", reason: "why", other: "x"}, map[string]string{other: "y"}, map[string]string{state: "NonCompliant", reason: "why", other: "y"}, "u"},
		"over":                    {map[string]string{state: "Compliant"}, map[string]string{state: "NonCompliant", reason: "why", other: "y"}, map[string]string{state: "Compliant", other: "y"}, "u"},
		"written by a user":       {map[string]string{state: "NonCompliant", reason: "why"}, map[string]string{state: "Compliant", reason: "all is well"}, map[string]string{state: "NonCompliant", reason: "why"}, "u"},
		"nothing said":            {nil, map[string]string{state: "Unknown"}, map[string]string{state: "Unknown"}, "u"},
		"another claim since":     {map[string]string{state: "NonCompliant"}, nil, nil, "another"},
		"said already, no change": {map[string]string{state: "Compliant"}, map[string]string{state: "Compliant"}, map[string]string{state: "Compliant"}, "u"},
	} {
		t.Run(name, func(t *testing.T) {
			claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "data", UID: "u", Annotations: tc.claim}, Spec: corev1.PersistentVolumeClaimSpec{VolumeName: "pv"}}
			pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv", Annotations: tc.volume}, Spec: corev1.PersistentVolumeSpec{
				ClaimRef: &corev1.ObjectReference{Namespace: "ns", Name: "data", UID: claim.UID}}}
			if tc.uid != "u" {
				pv.Spec.ClaimRef.UID = "another"
			}
			client := fake.NewClientset(claim, pv)
			c, err := New(client, nil)
			if err != nil {
				t.Fatal(err)
			}
			c.factory.Start(t.Context().Done())
			c.factory.WaitForCacheSync(t.Context().Done())
			if err := c.sync(t.Context(), "pv"); err != nil {
				t.Fatal(err)
			}
			got, err := client.CoreV1().PersistentVolumeClaims("ns").Get(t.Context(), "data", metav1.GetOptions{})
			if err != nil || !maps.Equal(got.Annotations, tc.want) {
				t.Errorf("annotations %v, want %v (%v)", got.Annotations, tc.want, err)
			}
			if name == "said already, no change" {
				for _, a := range client.Actions() {
					if a.GetVerb() == "patch" {
						t.Error("it was written all the same")
					}
				}
			}
		})
	}
}
