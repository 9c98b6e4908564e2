package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

const (
	busybox = "atoll.local/busybox"
	web     = "atoll.local/web"
	// writer is the container whose log is judged.
	writer = "writer"
)

// counter writes numbered lines, burst of them every pause seconds, until
// /tmp/stop is there; then how many there were.
func counter(pause, burst int) []string {
	return []string{"sh", "-c", fmt.Sprintf(`trap 'exit 0' TERM
touch /tmp/up; i=0
while [ ! -e /tmp/stop ]; do
  n=0; while [ $n -lt %d ]; do n=$((n+1)); i=$((i+1)); echo "line $i"; done
  sleep %d
done
echo "end $i"
while true; do sleep 3600 & wait; done`, burst, pause)}
}

// A kind is a sort of pod that must not notice.
type kind struct {
	name string
	make func(*corev1.PodSpec)
}

// kinds are as different as what the kubelet does to them after a restart.
// Probes fail at once here: one that fails because the node agent was away is
// seen.
var kinds = []kind{
	{"plain", func(*corev1.PodSpec) {}},
	{"ready-exec", func(s *corev1.PodSpec) { s.Containers[0].ReadinessProbe = execProbe("test", "-e", "/tmp/up") }},
	{"alive-exec", func(s *corev1.PodSpec) {
		// Without the startup probe the first liveness probe may come before the
		// file, and the container, ready by then, is restarted as it should be.
		c := &s.Containers[0]
		c.LivenessProbe, c.StartupProbe = execProbe("test", "-e", "/tmp/up"), execProbe("test", "-e", "/tmp/up")
		c.StartupProbe.FailureThreshold = 60
	}},
	{"ready-http", func(s *corev1.PodSpec) {
		s.Containers = append(s.Containers, withWeb(func(c *corev1.Container) { c.ReadinessProbe = httpProbe() }))
	}},
	{"alive-http", func(s *corev1.PodSpec) {
		s.Containers = append(s.Containers, withWeb(func(c *corev1.Container) {
			c.LivenessProbe, c.StartupProbe = httpProbe(), httpProbe()
			c.StartupProbe.FailureThreshold = 60
		}))
	}},
	{"sidecar", func(s *corev1.PodSpec) {
		always := corev1.ContainerRestartPolicyAlways
		side := container("side", busybox, "sh", "-c", "touch /tmp/up; exec sleep 36000")
		side.RestartPolicy, side.StartupProbe = &always, execProbe("test", "-e", "/tmp/up")
		side.StartupProbe.FailureThreshold = 60
		s.InitContainers = []corev1.Container{container("init", busybox, "true"), side}
	}},
	{"volumes", func(s *corev1.PodSpec) {
		s.Volumes = []corev1.Volume{
			{Name: "scratch", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
			{Name: "config", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
				LocalObjectReference: corev1.LocalObjectReference{Name: "kube-root-ca.crt"}}}},
		}
		s.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "scratch", MountPath: "/scratch"}, {Name: "config", MountPath: "/config"}}
	}},
	{"burst", func(s *corev1.PodSpec) { s.Containers[0].Command = counter(2, 40) }},
	{"slow", func(s *corev1.PodSpec) { s.Containers[0].Command = counter(5, 1) }},
	{"never", func(s *corev1.PodSpec) { s.RestartPolicy = corev1.RestartPolicyNever }},
}

const probeTimeout = 60 // seconds; slow is not failed, on a loaded machine

func execProbe(command ...string) *corev1.Probe {
	return &corev1.Probe{PeriodSeconds: 10, FailureThreshold: 1, TimeoutSeconds: probeTimeout,
		ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: command}}}
}

func httpProbe() *corev1.Probe {
	return &corev1.Probe{PeriodSeconds: 10, FailureThreshold: 1, TimeoutSeconds: probeTimeout,
		ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromInt32(8080)}}}
}

func withWeb(change func(*corev1.Container)) corev1.Container {
	c := container("web", web)
	// It must listen before the first probe, which may fail no more than any.
	change(&c)
	for _, p := range []*corev1.Probe{c.ReadinessProbe, c.LivenessProbe} {
		if p != nil {
			p.InitialDelaySeconds = 10
		}
	}
	return c
}

func container(name, image string, command ...string) corev1.Container {
	return corev1.Container{Name: name, Image: image, Command: command,
		Resources: corev1.ResourceRequirements{
			Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m"), corev1.ResourceMemory: resource.MustParse("32Mi")},
			Limits:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("64Mi")},
		}}
}

// newPod is a pod whose first container counts.
func newPod(name string, change func(*corev1.PodSpec)) *corev1.Pod {
	grace := int64(1)
	spec := corev1.PodSpec{TerminationGracePeriodSeconds: &grace, Containers: []corev1.Container{container(writer, busybox, counter(2, 1)...)}}
	change(&spec)
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}
}

// bootsAtOnce is how many of the pods that must not notice boot at a time.
const bootsAtOnce = 3

// startSteady makes the pods that must not notice and waits until all are
// ready.
func (c *client) startSteady(ctx context.Context, n int) ([]*corev1.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, 8*time.Minute)
	defer cancel()
	all := make([]*corev1.Pod, n)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(bootsAtOnce)
	for i := range all {
		k := kinds[i%len(kinds)]
		name := "steady-" + strconv.Itoa(i) + "-" + k.name
		g.Go(func() (err error) {
			if _, err = c.pods().Create(ctx, newPod(name, k.make), metav1.CreateOptions{}); err == nil {
				all[i], err = c.awaitPod(ctx, name, "to be ready", isReady)
			}
			return err
		})
	}
	return all, g.Wait()
}

// awaitPod waits until a pod is as it should be.
func (c *client) awaitPod(ctx context.Context, name, what string, is func(*corev1.Pod) bool) (*corev1.Pod, error) {
	for {
		p, err := c.pods().Get(ctx, name, metav1.GetOptions{})
		if err != nil && ctx.Err() == nil {
			return nil, err
		}
		if err == nil && is(p) {
			return p, nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return nil, fmt.Errorf("waited for pod %s %s: phase %s, %+v: %w", name, what, p.Status.Phase, p.Status.ContainerStatuses, context.Cause(ctx))
		}
	}
}

// checkLog stops a counter and says what is wrong with its log: every line
// must be there, once and in order.
func (c *client) checkLog(ctx context.Context, pod string) (lines int, err error) {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	err = until(ctx, "stop it", func(ctx context.Context) error {
		_, err := c.exec(ctx, pod, writer, "touch", "/tmp/stop")
		return err
	})
	if err != nil {
		return 0, err
	}
	for {
		text, err := c.log(ctx, pod, writer)
		all := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
		last := all[len(all)-1]
		if err == nil && strings.HasPrefix(last, "end ") {
			return len(all) - 1, judgeLog(all)
		}
		select {
		case <-time.After(300 * time.Millisecond):
		case <-ctx.Done():
			return 0, fmt.Errorf("the log does not end: %d lines, the last is %q (%v)", len(all), last, err)
		}
	}
}

// judgeLog checks the lines of a counter.
func judgeLog(lines []string) error {
	for i, l := range lines[:len(lines)-1] {
		if want := "line " + strconv.Itoa(i+1); l != want {
			return fmt.Errorf("line %d of the log is %q, want %q", i+1, l, want)
		}
	}
	if last, want := lines[len(lines)-1], "end "+strconv.Itoa(len(lines)-1); last != want {
		return fmt.Errorf("the log's end is %q, want %q", last, want)
	}
	return nil
}

func isReady(p *corev1.Pod) bool {
	for _, cond := range p.Status.Conditions {
		if cond.Type == corev1.PodReady {
			return cond.Status == corev1.ConditionTrue
		}
	}
	return false
}
