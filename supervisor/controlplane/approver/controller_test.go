package approver

import (
	"context"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

// TestControllerWaitsForAddresses: the request comes before the Node's
// addresses and is approved as soon as they are there; a wrong one is denied.
func TestControllerWaitsForAddresses(t *testing.T) {
	good, bad := newSample(), newSample()
	good.encode(t)
	bad.csr.Name, bad.csr.Spec.Username = "csr-2", "jane"
	bad.encode(t)
	good.csr.CreationTimestamp = metav1.Now()
	addresses := good.node.Status.Addresses
	good.node.Status.Addresses = nil
	client := fake.NewClientset(good.node, &good.csr, &bad.csr)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c := New(client, Reserved{}, slog.New(slog.NewTextHandler(io.Discard, nil)))
	ended := make(chan error, 1)
	go func() { ended <- c.Run(ctx) }()

	condition := func(name string) *certificatesv1.CertificateSigningRequestCondition {
		csr, err := client.CertificatesV1().CertificateSigningRequests().Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if len(csr.Status.Conditions) == 0 {
			return nil
		}
		return &csr.Status.Conditions[0]
	}
	wait := func(name string, want certificatesv1.RequestConditionType) {
		for condition(name) == nil {
			select {
			case <-ctx.Done():
				t.Fatalf("%s was not decided", name)
			case <-time.After(10 * time.Millisecond):
			}
		}
		if got := condition(name); got.Type != want || !strings.HasPrefix(got.Message, "Atoll: ") || got.Status != corev1.ConditionTrue {
			t.Fatalf("%s: %+v, want %s", name, got, want)
		}
	}
	wait("csr-2", certificatesv1.CertificateDenied)
	if got := condition("csr-1"); got != nil {
		t.Fatalf("decided before the Node had addresses: %+v", got)
	}
	node := good.node.DeepCopy()
	node.Status.Addresses = addresses
	if _, err := client.CoreV1().Nodes().UpdateStatus(ctx, node, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	wait("csr-1", certificatesv1.CertificateApproved)
	if !c.Synced() {
		t.Error("not synced")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}
