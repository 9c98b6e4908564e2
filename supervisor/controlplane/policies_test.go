package controlplane

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// TestPolicies asks a real API server what a namespace forbids, and its
// scheduler where a pod may go.
func TestPolicies(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a control plane; about 15 s")
	}
	cfg := testConfig(t)
	s := startServer(t, cfg)
	p := &policyTest{admin: clientFrom(t, restFrom(t, cfg.Kubeconfig())), config: restFrom(t, cfg.Kubeconfig())}
	p.compiled(t)
	t.Run("annotations of VMs", p.vmAnnotations)
	t.Run("limits", p.limits)
	t.Run("storage classes", p.storageClasses)
	t.Run("node affinity", p.affinity)
	t.Run("compliance", p.compliance)
	t.Run("volumes of nodes", p.volumesOfNodes)
	t.Run("room of nodes", p.roomOfNodes)
	t.Run("scheduler", p.scheduler)
	s.stop(t)
}

type policyTest struct {
	admin  *kubernetes.Clientset
	config *rest.Config
}

// as returns a client of another user.
func (p *policyTest) as(t *testing.T, user string, groups ...string) *kubernetes.Clientset {
	t.Helper()
	c := rest.CopyConfig(p.config)
	c.Impersonate = rest.ImpersonationConfig{UserName: user, Groups: groups}
	return clientFrom(t, c)
}

// namespace makes one with annotations and returns its name.
func (p *policyTest) namespace(t *testing.T, name string, annotations map[string]string) string {
	t.Helper()
	if _, err := p.admin.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: annotations}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	// Admission has namespaces from a cache, and the service account controller
	// makes pods possible.
	eventually(t, "namespace "+name, func() error {
		_, err := p.admin.CoreV1().ServiceAccounts(name).Get(t.Context(), "default", metav1.GetOptions{})
		return err
	})
	return name
}

// plainPod asks for CPU and memory as a limit, where these are not empty.
func plainPod(cpu, memory string) *corev1.Pod {
	c := corev1.Container{Name: "c", Image: "atoll.local/busybox", Resources: corev1.ResourceRequirements{Limits: corev1.ResourceList{}}}
	for name, v := range map[corev1.ResourceName]string{corev1.ResourceCPU: cpu, corev1.ResourceMemory: memory} {
		if v != "" {
			c.Resources.Limits[name] = resource.MustParse(v)
		}
	}
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: "p-"}, Spec: corev1.PodSpec{Containers: []corev1.Container{c}}}
}

func (p *policyTest) dryRun(t *testing.T, namespace string, pod *corev1.Pod) (*corev1.Pod, error) {
	return p.admin.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
}

// refused fails unless err has all of the words.
func refused(t *testing.T, what string, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: allowed", what)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %v\nwants %q in it", what, err, w)
		}
	}
}

func allowed(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Errorf("%s: %v", what, err)
	}
}

// compiled waits until the policies work, and reads what the API server thinks
// of their types.
func (p *policyTest) compiled(t *testing.T) {
	t.Helper()
	for _, name := range []string{"vm-annotations.pods.atoll.dev", "namespace-limits.pods.atoll.dev", "storage-classes.claims.atoll.dev", "nodes.volumes.atoll.dev", "nodes.capacity.atoll.dev", "hosts.nodes.atoll.dev", "nodes.snapshots.atoll.dev"} {
		eventually(t, "types of "+name, func() error {
			o, err := p.admin.AdmissionregistrationV1().ValidatingAdmissionPolicies().Get(t.Context(), name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			if o.Status.TypeChecking == nil {
				return errors.New("not checked yet")
			}
			for _, w := range o.Status.TypeChecking.ExpressionWarnings {
				t.Errorf("%s: %s: %s", name, w.FieldRef, w.Warning)
			}
			return nil
		})
	}
	eventually(t, "an annotation refused", func() error {
		pod := plainPod("", "")
		pod.Annotations = map[string]string{v1alpha1.PodMACAnnotation: "x"}
		if _, err := p.dryRun(t, "default", pod); err == nil {
			return errors.New("allowed")
		}
		return nil
	})
}

func (p *policyTest) vmAnnotations(t *testing.T) {
	ctx, ns := t.Context(), p.namespace(t, "marked", nil)
	pods := p.admin.CoreV1().Pods(ns)
	patch := func(c kubernetes.Interface, name, value string, sub ...string) error {
		v := "null"
		if value != "" {
			v = fmt.Sprintf("%q", value)
		}
		_, err := c.CoreV1().Pods(ns).Patch(ctx, "web", types.StrategicMergePatchType, fmt.Appendf(nil, `{"metadata":{"annotations":{%q:%s}}}`, name, v), metav1.PatchOptions{}, sub...)
		return err
	}
	pod := plainPod("", "")
	pod.GenerateName, pod.Name, pod.Spec.NodeName = "", "web", "n1"
	if _, err := pods.Create(ctx, pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	node, supervisor := p.as(t, "system:node:n1", "system:nodes"), p.as(t, podMirrorUser)
	root := p.as(t, "root", "system:masters")
	for _, name := range v1alpha1.PodVMAnnotations() {
		of := "metadata.annotations[" + name + "]: only the pod's node and the supervisor"
		marked := plainPod("", "")
		marked.Annotations = map[string]string{name: "x"}
		_, err := p.dryRun(t, ns, marked)
		refused(t, "create with "+name, err, of, "leave the annotation out")
		for _, sub := range [][]string{nil, {"status"}} {
			refused(t, fmt.Sprint("set ", name, sub), patch(root, name, "x", sub...), of, "leave the annotation as it is")
		}
		allowed(t, "a node sets "+name, patch(node, name, "by the node", "status"))
		refused(t, "change "+name, patch(root, name, "x", "status"), of)
		refused(t, "take away "+name, patch(root, name, "", "status"), of)
		allowed(t, "the supervisor changes "+name, patch(supervisor, name, "by the supervisor", "status"))
	}
	allowed(t, "another annotation", patch(p.admin, "example.com/mac", "x"))
	got, err := pods.Get(ctx, "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range v1alpha1.PodVMAnnotations() {
		if got.Annotations[name] != "by the supervisor" {
			t.Errorf("%s is %q: the status does not take it along", name, got.Annotations[name])
		}
	}
	refused(t, "a node marks a pod of another", patch(p.as(t, "system:node:n2", "system:nodes"), v1alpha1.PodMACAnnotation, "x", "status"), "forbidden")

	waiting := plainPod("", "")
	waiting.GenerateName, waiting.Name, waiting.Spec.SchedulerName = "", "bound", "nobody"
	if _, err := pods.Create(ctx, waiting, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	bind := func(annotations map[string]string) error {
		return pods.Bind(ctx, &corev1.Binding{ObjectMeta: metav1.ObjectMeta{Name: "bound", Annotations: annotations}, Target: corev1.ObjectReference{Kind: "Node", Name: "n1"}}, metav1.CreateOptions{})
	}
	refused(t, "a binding that marks", bind(map[string]string{v1alpha1.PodVMUUIDAnnotation: "x"}), "metadata.annotations["+v1alpha1.PodVMUUIDAnnotation+"]")
	allowed(t, "a binding", bind(nil))
}

func (p *policyTest) limits(t *testing.T) {
	small := p.namespace(t, "small", map[string]string{v1alpha1.AnnotationMemoryLimit: "1024Mi", v1alpha1.AnnotationCPULimit: "2.0000"})
	classes := p.namespace(t, "classes", map[string]string{
		v1alpha1.AnnotationVMClasses: "wide,tall", v1alpha1.AnnotationVMClassSizes: "wide=4/1Gi,tall=1/4Gi",
		v1alpha1.AnnotationMemoryLimit: "", v1alpha1.AnnotationCPULimit: "",
	})
	zoned := p.namespace(t, "zoned", map[string]string{v1alpha1.AnnotationZones: "zone-a,zone-b"})
	asks := func(pod *corev1.Pod, class string) *corev1.Pod {
		pod.Labels = map[string]string{v1alpha1.LabelVMClass: class}
		return pod
	}
	in := func(pod *corev1.Pod, zone string) *corev1.Pod {
		pod.Spec.NodeSelector = map[string]string{corev1.LabelTopologyZone: zone}
		return pod
	}
	with := func(pod *corev1.Pod, more ...corev1.Container) *corev1.Pod {
		pod.Spec.Containers = append(pod.Spec.Containers, more...)
		return pod
	}
	container := func(name, memory string) corev1.Container {
		c := plainPod("", memory).Spec.Containers[0]
		c.Name = name
		return c
	}
	inits := func(pod *corev1.Pod, sidecar bool, c corev1.Container) *corev1.Pod {
		if always := corev1.ContainerRestartPolicyAlways; sidecar {
			c.RestartPolicy = &always
		}
		pod.Spec.InitContainers = append(pod.Spec.InitContainers, c)
		return pod
	}
	whole := func(pod *corev1.Pod, memory string) *corev1.Pod {
		pod.Spec.Resources = &corev1.ResourceRequirements{Limits: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse(memory)}}
		return pod
	}
	for name, tc := range map[string]struct {
		namespace string
		pod       *corev1.Pod
		words     []string // none: allowed
	}{
		"anything without limits":         {"default", plainPod("64", "512Gi"), nil},
		"within the limit":                {small, plainPod("1", "512Mi"), nil},
		"nothing asked for":               {small, plainPod("", ""), nil},
		"memory over the limit":           {small, plainPod("1", "1025Mi"), []string{"spec.containers", "the memory limit of namespace small is 1024Mi", "Mi of memory with its overhead", "lower the limits"}},
		"memory and overhead":             {small, plainPod("1", "1000Mi"), []string{"needs 1096Mi of memory with its overhead", "1024Mi"}},
		"CPU over the limit":              {small, plainPod("2500m", "1Mi"), []string{"needs 2505m of CPU with its overhead", "the CPU limit of namespace small is 2.0000"}},
		"sum of containers":               {small, with(plainPod("", "500Mi"), container("d", "500Mi")), []string{"the memory limit of namespace small is 1024Mi"}},
		"an init container that is large": {small, inits(plainPod("", "100Mi"), false, container("i", "2Gi")), []string{"needs 2144Mi"}},
		"init containers run by turns":    {small, inits(inits(plainPod("", "100Mi"), false, container("i", "700Mi")), false, container("j", "700Mi")), nil},
		"sidecars run beside":             {small, inits(plainPod("", "500Mi"), true, container("s", "500Mi")), []string{"needs 1096Mi"}},
		"a limit of the whole pod":        {small, whole(plainPod("", ""), "800Mi"), nil},
		"a large limit of the whole pod":  {small, whole(plainPod("", "500Mi"), "2Gi"), []string{"needs 2144Mi"}},
		"into a class":                    {classes, plainPod("4", "1Gi"), nil},
		"into the other class":            {classes, plainPod("1", "4Gi"), nil},
		"into no single class":            {classes, plainPod("2", "2Gi"), []string{"needs 2000m of CPU and 2048Mi of memory", "no VM class allows", "namespace classes (wide: 4 CPUs, 1Gi; tall: 1 CPUs, 4Gi)"}},
		"a class that it has":             {classes, asks(plainPod("1", "1Gi"), "tall"), nil},
		"larger than the class asked for": {classes, asks(plainPod("1", "2Gi"), "wide"), []string{"no VM class allows", "(wide: 4 CPUs, 1Gi)"}},
		"a class that it has not":         {classes, asks(plainPod("1", "1Gi"), "huge"), []string{"metadata.labels[atoll.dev/vm-class]: namespace classes has no VM class huge, it has wide, tall"}},
		"a class where there is none":     {small, asks(plainPod("1", "1Mi"), "huge"), []string{"has no VM class huge, it has none"}},
		"a zone that it has":              {zoned, in(plainPod("", ""), "zone-b"), nil},
		"a zone that it has not":          {zoned, in(plainPod("", ""), "zone-c"), []string{"spec.nodeSelector[topology.kubernetes.io/zone]: namespace zoned has no zone zone-c, it has zone-a, zone-b"}},
	} {
		_, err := p.dryRun(t, tc.namespace, tc.pod)
		if tc.words == nil {
			allowed(t, name, err)
		} else {
			refused(t, name, err, tc.words...)
		}
	}
	p.resize(t, small)
}

// resize holds that a pod cannot grow past the limit after it was made.
func (p *policyTest) resize(t *testing.T, namespace string) {
	ctx := t.Context()
	p.node(t, "n1", nil)
	pod := plainPod("1", "512Mi")
	pod.GenerateName, pod.Name, pod.Spec.NodeName = "", "grows", "n1"
	if _, err := p.admin.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	to := func(memory string) error {
		_, err := p.admin.CoreV1().Pods(namespace).Patch(ctx, "grows", types.StrategicMergePatchType,
			fmt.Appendf(nil, `{"spec":{"containers":[{"name":"c","resources":{"limits":{"memory":%q},"requests":{"memory":%q}}}]}}`, memory, memory), metav1.PatchOptions{}, "resize")
		return err
	}
	refused(t, "resize over the limit", to("2Gi"), "the memory limit of namespace small is 1024Mi")
	allowed(t, "resize within the limit", to("600Mi"))
}

func (p *policyTest) storageClasses(t *testing.T) {
	given := p.namespace(t, "given", map[string]string{v1alpha1.AnnotationStorageClasses: "gold,silver"})
	none := p.namespace(t, "none", map[string]string{v1alpha1.AnnotationStorageClasses: ""})
	claim := func(class *string) *corev1.PersistentVolumeClaim {
		return &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{GenerateName: "c-"}, Spec: corev1.PersistentVolumeClaimSpec{
			StorageClassName: class, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}},
		}}
	}
	gold, bronze, static := "gold", "bronze", ""
	// The API server takes up policies one by one.
	eventually(t, "a class refused", func() error {
		if _, err := p.admin.CoreV1().PersistentVolumeClaims(given).Create(t.Context(), claim(&bronze), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err == nil {
			return errors.New("allowed")
		}
		return nil
	})
	for name, tc := range map[string]struct {
		namespace string
		class     *string
		words     []string
	}{
		"where nothing is said":   {"default", &bronze, nil},
		"one that was given":      {given, &gold, nil},
		"the default, not given":  {given, nil, []string{"has not been given storage class atoll-local, it has gold, silver"}},
		"an administrator's":      {none, &static, nil},
		"one that was not given":  {given, &bronze, []string{"spec.storageClassName: namespace given has not been given storage class bronze, it has gold, silver"}},
		"where none was given":    {none, &gold, []string{"storage class gold, it has none"}},
		"the default, none given": {none, nil, []string{"storage class atoll-local, it has none"}},
	} {
		_, err := p.admin.CoreV1().PersistentVolumeClaims(tc.namespace).Create(t.Context(), claim(tc.class), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		pod := plainPod("", "")
		pod.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{VolumeClaimTemplate: &corev1.PersistentVolumeClaimTemplate{Spec: claim(tc.class).Spec}}}}}
		_, ephemeral := p.dryRun(t, tc.namespace, pod)
		if tc.words == nil {
			allowed(t, name, errors.Join(err, ephemeral))
			continue
		}
		refused(t, name, err, tc.words...)
		if tc.class == nil { // the default is put in when its claim is made
			allowed(t, name+", ephemeral", ephemeral)
			continue
		}
		refused(t, name+", ephemeral", ephemeral, "spec.volumes: an ephemeral volume asks for a storage class that namespace "+tc.namespace, "it has ")
	}
}

func requirement(key string, op corev1.NodeSelectorOperator, values ...string) corev1.NodeSelectorRequirement {
	return corev1.NodeSelectorRequirement{Key: key, Operator: op, Values: values}
}

// affinity reads what the policies add to what a pod wants itself.
func (p *policyTest) affinity(t *testing.T) {
	ns := p.namespace(t, "narrow", map[string]string{v1alpha1.AnnotationZones: "zone-a,zone-b", v1alpha1.AnnotationVMClasses: "gpu", v1alpha1.AnnotationVMClassSizes: "gpu=64/512Gi"})
	zones := requirement(corev1.LabelTopologyZone, corev1.NodeSelectorOpIn, "zone-a", "zone-b")
	class := requirement(v1alpha1.LabelNodeVMClass+"gpu", corev1.NodeSelectorOpExists)
	own := requirement("disk", corev1.NodeSelectorOpIn, "fast")
	field := requirement("metadata.name", corev1.NodeSelectorOpIn, "n1")
	term := func(r ...corev1.NodeSelectorRequirement) corev1.NodeSelectorTerm {
		return corev1.NodeSelectorTerm{MatchExpressions: r}
	}
	terms := func(list ...corev1.NodeSelectorTerm) *corev1.Affinity {
		return &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: list}}}
	}
	preferred := &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []corev1.PreferredSchedulingTerm{{Weight: 1, Preference: term(own)}}}}
	for name, tc := range map[string]struct {
		affinity *corev1.Affinity
		want     []corev1.NodeSelectorTerm // before the class, if one is asked for
	}{
		"none":         {nil, []corev1.NodeSelectorTerm{term(zones)}},
		"of pods":      {&corev1.Affinity{PodAntiAffinity: &corev1.PodAntiAffinity{}}, []corev1.NodeSelectorTerm{term(zones)}},
		"preferred":    {preferred, []corev1.NodeSelectorTerm{term(zones)}},
		"two terms":    {terms(term(own), term(own, own)), []corev1.NodeSelectorTerm{term(own, zones), term(own, own, zones)}},
		"by field":     {terms(corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{field}}), []corev1.NodeSelectorTerm{{MatchFields: []corev1.NodeSelectorRequirement{field}, MatchExpressions: []corev1.NodeSelectorRequirement{zones}}}},
		"that of none": {terms(term(own), corev1.NodeSelectorTerm{}), []corev1.NodeSelectorTerm{term(own, zones), {}}},
	} {
		for _, asks := range []bool{false, true} {
			pod := plainPod("", "")
			pod.Spec.Affinity = tc.affinity.DeepCopy()
			want := slices.Clone(tc.want)
			if asks {
				pod.Labels = map[string]string{v1alpha1.LabelVMClass: "gpu"}
				for i := range want {
					if len(want[i].MatchExpressions) > 0 {
						want[i].MatchExpressions = append(slices.Clone(want[i].MatchExpressions), class)
					}
				}
			}
			got, err := p.dryRun(t, ns, pod)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			have := sorted(got.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms)
			if fmt.Sprint(have) != fmt.Sprint(sorted(want)) {
				t.Errorf("%s, class asked for %v: terms %v, want %v", name, asks, have, sorted(want))
			}
			if tc.affinity == preferred && len(got.Spec.Affinity.NodeAffinity.PreferredDuringSchedulingIgnoredDuringExecution) != 1 {
				t.Errorf("%s: what the pod prefers is lost: %v", name, got.Spec.Affinity)
			}
		}
	}
}

// sorted orders the expressions within each term, which has no meaning.
func sorted(terms []corev1.NodeSelectorTerm) []corev1.NodeSelectorTerm {
	for i := range terms {
		slices.SortFunc(terms[i].MatchExpressions, func(a, b corev1.NodeSelectorRequirement) int { return strings.Compare(a.Key, b.Key) })
	}
	return terms
}

// node makes one with plenty of room.
func (p *policyTest) node(t *testing.T, name string, labels map[string]string) {
	t.Helper()
	if _, err := p.admin.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	status := []byte(`{"status":{"allocatable":{"cpu":"64","memory":"64Gi","pods":"50"},"capacity":{"cpu":"64","memory":"64Gi","pods":"50"},"conditions":[{"type":"Ready","status":"True","reason":"Test","message":""}]}}`)
	if _, err := p.admin.CoreV1().Nodes().PatchStatus(t.Context(), name, status); err != nil {
		t.Fatal(err)
	}
}

// scheduler makes nodes, and looks where pods go.
func (p *policyTest) scheduler(t *testing.T) {
	ctx := t.Context()
	for name, labels := range map[string]map[string]string{
		"a1": {corev1.LabelTopologyZone: "zone-a"},
		"b1": {corev1.LabelTopologyZone: "zone-b", v1alpha1.LabelNodeVMClass + "gpu": "true"},
		"c1": {corev1.LabelTopologyZone: "zone-c", v1alpha1.LabelNodeVMClass + "gpu": "true"},
	} {
		p.node(t, name, labels)
	}
	only := p.namespace(t, "only-b", map[string]string{v1alpha1.AnnotationZones: "zone-b"})
	classes := p.namespace(t, "classes-ab", map[string]string{v1alpha1.AnnotationZones: "zone-a,zone-b", v1alpha1.AnnotationVMClasses: "gpu,rare", v1alpha1.AnnotationVMClassSizes: "gpu=64/512Gi,rare=1/1Gi"})
	for _, tc := range []struct{ name, namespace, class, want string }{
		{"zone", only, "", "b1"},
		{"class", classes, "gpu", "b1"},
		{"nowhere", classes, "rare", ""},
	} {
		for i := range 3 { // by chance it would be right once
			pod := plainPod("1", "64Mi")
			pod.GenerateName, pod.Name = "", fmt.Sprint(tc.name, i)
			if tc.class != "" {
				pod.Labels = map[string]string{v1alpha1.LabelVMClass: tc.class}
			}
			if _, err := p.admin.CoreV1().Pods(tc.namespace).Create(ctx, pod, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			eventually(t, "verdict on "+pod.Name, func() error {
				got, err := p.admin.CoreV1().Pods(tc.namespace).Get(ctx, pod.Name, metav1.GetOptions{})
				if err != nil {
					return err
				}
				at := slices.IndexFunc(got.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.PodScheduled })
				if at < 0 || got.Spec.NodeName != tc.want || tc.want == "" && !strings.Contains(got.Status.Conditions[at].Message, "didn't match Pod's node affinity/selector") {
					return fmt.Errorf("on %q, want %q: %v", got.Spec.NodeName, tc.want, got.Status.Conditions)
				}
				return nil
			})
		}
	}
}

// compliance writes what a node may, and reads what the supervisor makes of it.
func (p *policyTest) compliance(t *testing.T) {
	ctx, ns := t.Context(), p.namespace(t, "complies", nil)
	claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: "data"}, Spec: corev1.PersistentVolumeClaimSpec{
		VolumeName: "complies-pv", AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, StorageClassName: new(string),
		Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}},
	}}
	claim, err := p.admin.CoreV1().PersistentVolumeClaims(ns).Create(ctx, claim, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	node := p.as(t, "system:node:n1", "system:nodes")
	pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "complies-pv"}, Spec: corev1.PersistentVolumeSpec{
		Capacity: claim.Spec.Resources.Requests, AccessModes: claim.Spec.AccessModes,
		ClaimRef:               &corev1.ObjectReference{Namespace: ns, Name: "data", UID: claim.UID},
		PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: "csi.atoll.dev", VolumeHandle: "x"}},
	}}
	if _, err := p.admin.CoreV1().PersistentVolumes().Create(ctx, pv, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	patch := func(state string) []byte {
		return fmt.Appendf(nil, `{"metadata":{"annotations":{%q:%q}}}`, v1alpha1.AnnotationPolicyCompliance, state)
	}
	for _, sub := range [][]string{nil, {"status"}} {
		_, err := node.CoreV1().PersistentVolumeClaims(ns).Patch(ctx, "data", types.MergePatchType, patch("Compliant"), metav1.PatchOptions{}, sub...)
		refused(t, fmt.Sprint("a node writes the claim", sub), err, "forbidden")
	}
	for _, state := range []string{"NonCompliant", "Compliant"} {
		_, err := node.CoreV1().PersistentVolumes().Patch(ctx, "complies-pv", types.MergePatchType, patch(state), metav1.PatchOptions{})
		allowed(t, "a node writes the volume", err)
		eventually(t, "the claim says "+state, func() error {
			c, err := p.admin.CoreV1().PersistentVolumeClaims(ns).Get(ctx, "data", metav1.GetOptions{})
			if err == nil && c.Annotations[v1alpha1.AnnotationPolicyCompliance] != state {
				err = fmt.Errorf("annotations %v", c.Annotations)
			}
			return err
		})
	}
}
