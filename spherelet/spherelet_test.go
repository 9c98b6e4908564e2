package spherelet

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/cmd/kubelet/app/options"
	"k8s.io/kubernetes/pkg/kubelet/cm"
	"k8s.io/kubernetes/pkg/kubelet/lifecycle"

	"github.com/openatoll/atoll/spherelet/admission"
	"github.com/openatoll/atoll/spherelet/config"
	"github.com/openatoll/atoll/spherelet/machine"
	"github.com/openatoll/atoll/spherelet/resources"
	"github.com/openatoll/atoll/vmpod"
)

// recorder is a Preparer that remembers what it was told.
type recorder struct {
	prepared []vmpod.Hint
	forgot   []string
	err      error
}

func (r *recorder) Prepare(_ context.Context, h vmpod.Hint) error {
	r.prepared = append(r.prepared, h)
	return r.err
}

func (r *recorder) Forget(_ context.Context, uid string) error {
	r.forgot = append(r.forgot, uid)
	return nil
}

func pod(uid string) *v1.Pod {
	return &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{UID: types.UID("uid-" + uid), Name: "p", Namespace: "n"},
		Spec:       v1.PodSpec{Containers: []v1.Container{{Name: "c", Image: "i:1"}}},
		Status:     v1.PodStatus{Phase: v1.PodPending},
	}
}

func handler(r *recorder, events record.EventRecorder) *admitHandler {
	p := newPreparations(r, func() map[string]bool { return map[string]bool{} }, slog.Default())
	return &admitHandler{preps: p, events: func() record.EventRecorder { return events }, log: slog.Default(),
		host: admission.Host{CPUs: 2, Memory: 4 << 30}, extended: func(string) bool { return false }}
}

func TestAdmit(t *testing.T) {
	var r recorder
	h := handler(&r, record.NewFakeRecorder(10))
	if got := h.Admit(&lifecycle.PodAdmitAttributes{Pod: pod("a"), Operation: lifecycle.AddOperation}); !got.Admit {
		t.Fatalf("Admit = %+v", got)
	}
	if len(r.prepared) != 1 || r.prepared[0].Pool != "besteffort" || r.prepared[0].CPUs != 1 ||
		!slices.Equal(r.prepared[0].Images, []string{"i:1"}) || r.prepared[0].Memory < 512<<20 {
		t.Errorf("prepared %+v", r.prepared)
	}

	two := pod("two")
	two.Spec.Containers = append(two.Spec.Containers, v1.Container{Name: "other", Image: "private:1"})
	if images := hintOf(two, resources.Size{}).Images; len(images) != 0 {
		t.Errorf("images %v are in the VM before the pull secrets of the second are checked", images)
	}

	refused := pod("b")
	refused.Spec.HostPID = true
	got := h.Admit(&lifecycle.PodAdmitAttributes{Pod: refused, Operation: lifecycle.AddOperation})
	if got.Admit || got.Reason != admission.ReasonHostNamespace || !strings.Contains(got.Message, "spec.hostPID") {
		t.Errorf("Admit = %+v", got)
	}

	running := pod("c")
	running.Status.ContainerStatuses = []v1.ContainerStatus{{ContainerID: "atoll://1"}}
	if !h.Admit(&lifecycle.PodAdmitAttributes{Pod: running, Operation: lifecycle.AddOperation}).Admit ||
		!h.Admit(&lifecycle.PodAdmitAttributes{Pod: pod("d"), Operation: lifecycle.ResizeOperation}).Admit {
		t.Error("a running pod or a resize was refused")
	}
	if len(r.prepared) != 1 {
		t.Errorf("prepared again: %+v", r.prepared[1:])
	}

	// A Preparer that fails is no reason to refuse the pod.
	r.err = errors.New("no room")
	if !h.Admit(&lifecycle.PodAdmitAttributes{Pod: pod("e"), Operation: lifecycle.AddOperation}).Admit {
		t.Error("refused for a failed preparation")
	}
}

func TestAdmitTells(t *testing.T) {
	events := record.NewFakeRecorder(10)
	p := pod("a")
	p.Spec.Containers[0].Resources.Limits = v1.ResourceList{"memory": resource.MustParse("1Ti")}
	p.Spec.SecurityContext = &v1.PodSecurityContext{SELinuxOptions: &v1.SELinuxOptions{}}
	h := handler(&recorder{}, events)
	h.policy.HostMemory = 4 << 30
	h.Admit(&lifecycle.PodAdmitAttributes{Pod: p, Operation: lifecycle.AddOperation})
	for _, want := range []string{"SizeCapped", admission.ReasonNoEffectOfSELinux} {
		select {
		case e := <-events.Events:
			if !strings.Contains(e, want) {
				t.Errorf("event %q, want %s", e, want)
			}
		default:
			t.Errorf("no event %s", want)
		}
	}
}

func TestPreparationsAreForgotten(t *testing.T) {
	var r recorder
	active := map[string]bool{}
	p := newPreparations(&r, func() map[string]bool { return active }, slog.Default())
	now := time.Unix(1000, 0)
	p.now = func() time.Time { return now }
	hint := func(uid string) vmpod.Hint { return vmpod.Hint{Owner: vmpod.Owner{PodUID: uid}} }
	for _, uid := range []string{"kept", "refused", "used", "old"} {
		p.start(hint(uid))
	}
	active = map[string]bool{"kept": true, "old": true}
	p.sweep(context.Background())
	if len(r.forgot) != 0 {
		t.Errorf("forgot %v while the kubelet was still deciding", r.forgot)
	}
	p.used("used")
	now = now.Add(2 * time.Second)
	p.sweep(context.Background())
	p.sweep(context.Background())
	if !slices.Equal(r.forgot, []string{"refused"}) {
		t.Errorf("forgot %v, want the refused one, once", r.forgot)
	}
	now = now.Add(unusedAfter)
	p.sweep(context.Background())
	if len(p.waiting) != 0 || len(r.forgot) != 1 {
		t.Errorf("waiting %v, forgot %v; the runtime drops old ones itself", p.waiting, r.forgot)
	}
	// Nothing is concluded before the kubelet knows its pods.
	p.start(hint("early"))
	active = nil
	now = now.Add(time.Minute)
	p.sweep(context.Background())
	if len(r.forgot) != 1 {
		t.Errorf("forgot %v without a list of pods", r.forgot)
	}
}

func TestPodContainerManager(t *testing.T) {
	dir := t.TempDir()
	fresh := func() *podContainerManager {
		return newPodContainerManager(cm.NewStubContainerManager().NewPodContainerManager(), dir)
	}
	m, p := fresh(), pod("a")
	if !m.Exists(p) {
		t.Error("the kubelet would kill the pod")
	}
	for _, name := range []v1.ResourceName{v1.ResourceCPU, v1.ResourceMemory} {
		c, err := m.GetPodCgroupConfig(p, name)
		if err != nil {
			t.Fatal(err)
		}
		// As upstream reads it: nothing may be nil.
		if name == v1.ResourceMemory && (cm.MemoryLimitsFromConfig(c) != nil) {
			t.Errorf("memory of a pod without limits: %v", cm.MemoryLimitsFromConfig(c))
		}
		if name == v1.ResourceCPU && (cm.CPULimitsFromConfig(c) != nil || cm.CPURequestsFromConfig(c) == nil) {
			t.Errorf("CPU of a pod without limits: %v", c)
		}
	}
	limit := int64(64 << 20)
	if err := m.SetPodCgroupConfig(klog.Background(), p, &cm.ResourceConfig{Memory: &limit}); err != nil {
		t.Fatal(err)
	}
	// Another process, after the allocation has moved on.
	p.Spec.Containers[0].Resources.Limits = v1.ResourceList{"memory": resource.MustParse("1Gi")}
	c, err := fresh().GetPodCgroupConfig(p, v1.ResourceMemory)
	if err != nil || *c.Memory != limit {
		t.Errorf("after a restart %v, %v; want what was applied last", c, err)
	}
	name, parent := m.GetPodContainerName(p)
	if len(name) != 3 || parent != "/atoll/burstable/pod"+string(p.UID) {
		t.Errorf("GetPodContainerName = %v, %s", name, parent)
	}
}

func TestHostOSLeavesLegacyLogsAlone(t *testing.T) {
	var o hostOS
	if err := o.Symlink("/x", legacyLogs+"/a.log"); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(legacyLogs + "/a.log"); err == nil {
		t.Error("the link was made")
	}
	file := filepath.Join(t.TempDir(), "f")
	if err := o.Symlink("/x", file); err != nil {
		t.Error(err)
	}
	if m, err := o.Glob(file); err != nil || len(m) != 1 {
		t.Errorf("Glob elsewhere = %v, %v", m, err)
	}
	if err := o.Remove(file); err != nil {
		t.Error(err)
	}
}

func TestNodePatches(t *testing.T) {
	f := Facts{Accelerator: "tcg", KVM: KVMUnusable, KVMReason: "too slow", GuestKernel: "stock", GuestRelease: "6.1"}
	node := &v1.Node{}
	var patch struct {
		Metadata struct {
			Labels      map[string]string
			Annotations map[string]*string
		}
	}
	if err := json.Unmarshal(metadataPatch(node, f), &patch); err != nil {
		t.Fatal(err)
	}
	if patch.Metadata.Labels[LabelKVM] != "unusable" || *patch.Metadata.Annotations[AnnotationKVMReason] != "too slow" {
		t.Errorf("patch = %+v", patch)
	}
	node.Labels, node.Annotations = f.labels(), f.annotations()
	if b := metadataPatch(node, f); b != nil {
		t.Errorf("patch of a Node that says it all: %s", b)
	}
	f.KVM, f.KVMReason, f.Accelerator = KVMUsable, "", "kvm"
	if b := string(metadataPatch(node, f)); !strings.Contains(b, `"atoll.dev/kvm-reason":null`) || !strings.Contains(b, `"atoll.dev/kvm":"usable"`) {
		t.Errorf("patch after KVM works: %s", b)
	}
}

func TestConditions(t *testing.T) {
	now := time.Now()
	tests := []struct {
		facts  Facts
		status v1.ConditionStatus
		reason string
	}{
		{Facts{Accelerator: "kvm", KVM: KVMUsable}, v1.ConditionTrue, "KVMUsable"},
		{Facts{Accelerator: "tcg", KVM: KVMUnusable, KVMReason: "slow"}, v1.ConditionFalse, "KVMUnusable"},
		{Facts{Accelerator: "tcg", KVM: KVMAbsent}, v1.ConditionFalse, "KVMAbsent"},
		{Facts{Accelerator: "tcg", KVM: KVMUsable}, v1.ConditionFalse, "EmulationChosen"},
	}
	for _, tt := range tests {
		c := tt.facts.condition()
		if c.Status != tt.status || c.Reason != tt.reason || c.Message == "" {
			t.Errorf("condition of %+v = %+v", tt.facts, c)
		}
		if (c.Status == v1.ConditionFalse) != strings.Contains(c.Message, "no security boundary") {
			t.Errorf("message %q", c.Message)
		}
		node := &v1.Node{}
		if conditionPatch(node, c, now) == nil {
			t.Error("no patch for a Node without the condition")
		}
		node.Status.Conditions = []v1.NodeCondition{c}
		if b := conditionPatch(node, c, now); b != nil {
			t.Errorf("patch for a Node that has it: %s", b)
		}
	}
}

func TestKubeletServerIsValid(t *testing.T) {
	cfg, err := config.Parse([]byte("apiVersion: atoll.dev/v1alpha1\nkind: SphereletConfiguration\nnodeName: a\nnodeIP: 192.0.2.1\n" +
		"dataDir: /var/lib/a\nclientCAFile: /ca\nclusterCIDR: 198.19.0.0/16\ntaints: [\"a=b:NoSchedule\"]\nlabels: {example.com/x: \"y\"}\nhypervisor: {guest: /g}\nimages: {gcHighThresholdPercent: 90}\ntracing: {samplingRatePerMillion: 7}\n"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := kubeletServer(cfg, config.PathsOf(cfg), Facts{Accelerator: "kvm", KVM: KVMUsable}.labels(), 16<<30)
	if err != nil {
		t.Fatal(err)
	}
	if err := options.ValidateKubeletServer(s); err != nil {
		t.Fatal(err)
	}
	if s.Authentication.Anonymous.Enabled || s.ReadOnlyPort != 0 || s.EnableSystemLogHandler || s.EnableProfilingHandler || s.MakeIPTablesUtilChains {
		t.Error("an open door")
	}
	if s.NodeLabels[LabelAccelerator] != "kvm" || s.NodeLabels["example.com/x"] != "y" || len(s.RegisterWithTaints) != 1 {
		t.Errorf("labels %v, taints %v", s.NodeLabels, s.RegisterWithTaints)
	}
	if s.Tracing == nil || s.Tracing.Endpoint != nil || *s.Tracing.SamplingRatePerMillion != 7 {
		t.Errorf("tracing %+v", s.Tracing)
	}
	if s.ImageGCHighThresholdPercent != 90 || s.ImageGCLowThresholdPercent != config.DefaultGCLow {
		t.Errorf("image GC from %d %% to %d %%", s.ImageGCHighThresholdPercent, s.ImageGCLowThresholdPercent)
	}
	reserved, err := allocatable(&s.KubeletConfiguration)
	if err != nil || len(reserved.HardEvictionThresholds) != 4 {
		t.Fatalf("allocatable = %+v, %v", reserved, err)
	}
	m := newContainerManager(machine.New(t.TempDir(), t.TempDir(), "atoll/x"), nodeConfig("a", "/k", reserved), nil, t.TempDir())
	capacity := m.GetCapacity(true)
	if capacity.StorageEphemeral().IsZero() || capacity.Cpu().IsZero() || capacity.Memory().IsZero() {
		t.Errorf("capacity %v", capacity)
	}
	if _, ok := m.GetCapacity(false)[v1.ResourceEphemeralStorage]; ok {
		t.Error("ephemeral storage without isolation")
	}
	reservation := m.GetNodeAllocatableReservation()
	if reservation.Memory().Cmp(reserved.KubeReserved[v1.ResourceMemory]) <= 0 || reservation.StorageEphemeral().IsZero() {
		t.Errorf("reservation %v does not hold kubeReserved %v and the eviction thresholds", reservation, reserved.KubeReserved)
	}
	p := pod("a")
	p.Spec.ResourceClaims = []v1.PodResourceClaim{{Name: "gpu"}}
	if m.PrepareDynamicResources(context.Background(), p) == nil {
		t.Error("a claim is served without its device")
	}
}
