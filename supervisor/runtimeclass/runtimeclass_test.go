package runtimeclass

import (
	"encoding/json"
	"testing"

	"github.com/containerd/errdefs"
	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

func TestOverheadIsKeptOnceItIsThere(t *testing.T) {
	ctx := t.Context()
	client := fake.NewClientset()
	for name, f := range map[string]func() error{
		"Ensure": func() error { return Ensure(ctx, client) },
		"Write":  func() error { return Write(ctx, client, Measurement{}) },
	} {
		if err := f(); !errdefs.IsNotFound(err) {
			t.Errorf("%s without a class: %v, want ErrNotFound", name, err)
		}
	}
	class := &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: Name}, Handler: Name}
	if _, err := client.NodeV1().RuntimeClasses().Create(ctx, class, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	is := func(want Overhead) *nodev1.RuntimeClass {
		t.Helper()
		c, err := client.NodeV1().RuntimeClasses().Get(ctx, Name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if c.Overhead == nil || c.Overhead.PodFixed.Memory().Value() != want.Memory || c.Overhead.PodFixed.Cpu().MilliValue() != want.MilliCPU {
			t.Fatalf("overhead %+v, want %+v", c.Overhead, want)
		}
		return c
	}
	if err := Ensure(ctx, client); err != nil {
		t.Fatal(err)
	}
	is(Default)
	measured := Measurement{Overhead: Overhead{MilliCPU: 10, Memory: 40 << 20}, Cloned: true}
	if err := Write(ctx, client, measured); err != nil {
		t.Fatal(err)
	}
	if err := Ensure(ctx, client); err != nil { // the next start
		t.Fatal(err)
	}
	var told Measurement
	if err := json.Unmarshal([]byte(is(measured.Overhead).Annotations[AnnotationMeasured]), &told); err != nil || told != measured {
		t.Errorf("the annotation tells %+v, %v; want %+v", told, err, measured)
	}
}
