package main

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// valueBytes is the length of a value in a counter's file, with its newline: it
// divides a block, so that no value lies in two.
const valueBytes = 16

// counterScript writes values. Each is on the disk before the observer hears of
// it.
const counterScript = `trap 'exit 0' TERM
run=$(cat /proc/sys/kernel/random/uuid); n=0
tell() { until timeout 5 wget -q -O /dev/null "http://$OBSERVER/$1?pod=$HOSTNAME&run=$run&n=$n"; do sleep 0.2; done; }
[ ! -e /data/log ] || n=$(( $(wc -c < /data/log) / 16 ))
tell begin
while :; do
  n=$((n+1))
  printf '%015d\n' $n | dd of=/data/log oflag=append conv=notrunc,fsync bs=16 2> /dev/null || { tell failed; exit 1; }
  tell wrote
done`

const counterSet = "counter"

func ignoreNotFound(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// startCounters makes the class and the StatefulSet and waits until all count.
func (t *volumesTrial) startCounters(ctx context.Context) error {
	wait, expand := storagev1.VolumeBindingWaitForFirstConsumer, true
	class := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: sharedPolicy}, Provisioner: "csi.atoll.dev",
		Parameters: map[string]string{"policy": sharedPolicy}, VolumeBindingMode: &wait, AllowVolumeExpansion: &expand}
	if _, err := t.c.StorageV1().StorageClasses().Create(ctx, class, metav1.CreateOptions{}); err != nil {
		return err
	}
	labels := map[string]string{"app": counterSet}
	replicas, grace := int32(len(t.pods)), int64(1) //nolint:gosec // three
	counter := container(writer, busybox, "sh", "-c", counterScript)
	counter.Env = []corev1.EnvVar{{Name: "OBSERVER", Value: t.observer.address}}
	counter.VolumeMounts = []corev1.VolumeMount{{Name: "data", MountPath: "/data"}}
	set := &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: counterSet}, Spec: appsv1.StatefulSetSpec{
		Replicas: &replicas, ServiceName: counterSet, PodManagementPolicy: appsv1.ParallelPodManagement, Selector: &metav1.LabelSelector{MatchLabels: labels},
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &grace, Containers: []corev1.Container{counter},
			TopologySpreadConstraints: []corev1.TopologySpreadConstraint{{MaxSkew: 1, TopologyKey: "kubernetes.io/hostname", WhenUnsatisfiable: corev1.ScheduleAnyway, LabelSelector: &metav1.LabelSelector{MatchLabels: labels}}},
		}},
		VolumeClaimTemplates: []corev1.PersistentVolumeClaim{{ObjectMeta: metav1.ObjectMeta{Name: "data"}, Spec: corev1.PersistentVolumeClaimSpec{
			StorageClassName: &class.Name, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("64Mi")}},
		}}},
	}}
	if _, err := t.c.AppsV1().StatefulSets(namespace).Create(ctx, set, metav1.CreateOptions{}); err != nil {
		return err
	}
	return t.back(ctx, nil, t.pods, time.Now(), &volumeKill{})
}

// checkBeside has a pod on the other node ask for a volume that is in use. It
// waits, with the reason, and the writer does not notice.
func (t *volumesTrial) checkBeside(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	user, err := t.c.pods().Get(ctx, t.pods[0], metav1.GetOptions{})
	if err != nil {
		return err
	}
	node := t.config.NodeName
	if user.Spec.NodeName == node {
		node = secondName
	}
	pod := newPod("beside", func(s *corev1.PodSpec) {
		s.NodeName = node
		s.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data-" + t.pods[0]}}}}
		s.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "data", MountPath: "/data"}}
	})
	if _, err := t.c.pods().Create(ctx, pod, metav1.CreateOptions{}); err != nil {
		return err
	}
	holder := regexp.MustCompile(`volume \S+ is in use by pod VM ` + string(user.UID) + `_0 on host ` + regexp.QuoteMeta(user.Spec.NodeName))
	err = until(ctx, "why a second pod waits", func(ctx context.Context) error {
		events, err := t.c.CoreV1().Events(namespace).List(ctx, metav1.ListOptions{FieldSelector: "involvedObject.name=" + pod.Name})
		if err != nil {
			return err
		}
		for _, e := range events.Items {
			if holder.MatchString(e.Message) {
				t.refusal = "volume … is in use by pod VM … on host " + user.Spec.NodeName
				return nil
			}
		}
		return fmt.Errorf("%d events, none of which names the holder", len(events.Items))
	})
	if err == nil {
		err = t.observer.awaitProgress(ctx, t.pods)
	}
	if err != nil {
		return fmt.Errorf("%w\n%s", err, t.c.explain(context.WithoutCancel(ctx)))
	}
	now := int64(0)
	if err := t.c.pods().Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		return err
	}
	return nil
}

// explain shows pods and events, for a run that got stuck.
func (c *client) explain(ctx context.Context) string {
	var b strings.Builder
	pods, err := c.pods().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err.Error()
	}
	for _, p := range pods.Items {
		fmt.Fprintf(&b, "pod %s on %s: %s deleted=%v %+v\n", p.Name, p.Spec.NodeName, p.Status.Phase, p.DeletionTimestamp, p.Status.ContainerStatuses)
	}
	events, err := c.CoreV1().Events(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err.Error()
	}
	for _, e := range events.Items[max(0, len(events.Items)-20):] {
		fmt.Fprintf(&b, "event of %s: %s %s\n", e.InvolvedObject.Name, e.Reason, e.Message)
	}
	return b.String()
}

// checkCounters reads every volume once more and compares it with what was
// acknowledged.
func (t *volumesTrial) checkCounters(ctx context.Context, r *volumesResult) {
	acked := t.observer.acked()
	for _, pod := range t.pods {
		r.Acknowledged += acked[pod]
		r.Begun += t.observer.begun()[pod]
		var text string
		try, cancel := context.WithTimeout(ctx, 2*time.Minute)
		err := until(try, "read the values", func(ctx context.Context) (err error) {
			text, err = t.c.exec(ctx, pod, writer, "cat", "/data/log")
			return err
		})
		cancel()
		if err == nil {
			err = judgeValues(text, acked[pod])
		}
		if err != nil {
			t.f.add("lost", "%s: %v", pod, err)
		}
	}
}

// judgeValues says whether a file has the values 1 to acked and those after
// them that were not acknowledged yet, each once and in order.
func judgeValues(text string, acked int64) error {
	n := int64(0)
	for line := range strings.Lines(text) {
		n++
		if want := fmt.Sprintf("%0*d\n", valueBytes-1, n); line != want {
			return fmt.Errorf("value %d is %q, must be %q", n, line, want)
		}
	}
	if n < acked {
		return fmt.Errorf("%d values are there, %d were acknowledged", n, acked)
	}
	return nil
}

var formatted = regexp.MustCompile(`a blank volume has a file system now.* volume=(\S+)`)

// checkFormats counts in the spherelets' logs how often a volume was formatted.
func (t *volumesTrial) checkFormats(r *volumesResult) {
	times := map[string]int{}
	for _, log := range []string{t.first.log, t.second.log} {
		text, err := os.ReadFile(log)
		if err != nil {
			t.f.add("format", "%v", err)
		}
		for _, m := range formatted.FindAllSubmatch(text, -1) {
			times[string(m[1])]++
		}
	}
	for volume, n := range times {
		if r.Formatted++; n > 1 {
			t.f.add("format", "volume %s was formatted %d times", volume, n)
		}
	}
	if len(times) != len(t.pods) {
		t.f.add("format", "the logs tell of %d volumes that were formatted, there are %d", len(times), len(t.pods))
	}
}

// checkLeft deletes everything and waits until the datastore and the hosts have
// nothing of it.
func (t *volumesTrial) checkLeft(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	err := t.c.AppsV1().StatefulSets(namespace).Delete(ctx, counterSet, metav1.DeleteOptions{})
	if err == nil {
		err = t.c.CoreV1().PersistentVolumeClaims(namespace).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{})
	}
	if err == nil {
		err = until(ctx, "when all was deleted", t.nothingLeft)
	}
	if err != nil {
		t.f.add("left", "%v", err)
	}
}

func (t *volumesTrial) nothingLeft(ctx context.Context) error {
	var left []string
	pods, err := t.c.pods().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for i := range pods.Items {
		left = append(left, "pod "+pods.Items[i].Name)
	}
	pvs, err := t.c.CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for i := range pvs.Items {
		left = append(left, "PersistentVolume "+pvs.Items[i].Name)
	}
	all, err := vms(t.cgroups()[1])
	if err != nil {
		return err
	}
	for name := range all {
		left = append(left, "QEMU "+name)
	}
	err = filepath.WalkDir(sharedDir(t.o.Work), func(path string, e fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(sharedDir(t.o.Work), path)
		if err == nil && !e.IsDir() && rel != "atoll-datastore.json" && rel != "atoll-lock" && filepath.Dir(rel) != "hosts" {
			left = append(left, "file "+rel)
		}
		return err
	})
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("left: %s", strings.Join(left, ", "))
	}
	return err
}

// An openWatch looks all the time which QEMUs have files of a datastore open.
type openWatch struct {
	mu sync.Mutex
	n  int
}

func (w *openWatch) looks() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.n
}

// watchOpen looks until ctx ends; two processes with one file open are a
// violation.
func watchOpen(ctx context.Context, f *findings, dir string) *openWatch {
	w := &openWatch{}
	told := map[string]bool{}
	go func() {
		for sleep(ctx, poll) == nil {
			for file, pids := range openers(dir) {
				if key := fmt.Sprint(file, pids); len(pids) > 1 && !told[key] {
					told[key] = true
					f.add("twice", "%s is open in the processes %v", file, pids)
				}
			}
			w.mu.Lock()
			w.n++
			w.mu.Unlock()
		}
	}()
	return w
}

// openers are the QEMUs that have files below a directory open.
func openers(dir string) map[string][]int {
	found := map[string][]int{}
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, proc := range procs {
		exe, err := os.Readlink(filepath.Join(proc, "exe"))
		if err != nil || !bytes.Contains([]byte(exe), []byte("qemu-system-")) {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(proc))
		fds, _ := filepath.Glob(filepath.Join(proc, "fd", "*"))
		for _, fd := range fds {
			file, err := os.Readlink(fd)
			if err == nil && strings.HasPrefix(file, dir+"/") && !slices.Contains(found[file], pid) {
				found[file] = append(found[file], pid)
			}
		}
	}
	return found
}
