package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// cloneStarts measures pods that are clones, image present, turn by turn with
// raw boots, from the create call to the status that says running; and of that,
// by what the Pod tells of its start, what was the kubelet's own.
func (b *podBench) cloneStarts(ctx context.Context, vm *vmBench, n int, all *results) error {
	if err := b.awaitTemplate(ctx); err != nil {
		return err
	}
	var raw, whole, kubelet, machine, container, rawCPU, cpu []float64
	for i := range n + 1 {
		r, rc, err := vm.rawBoot(ctx)
		if err != nil {
			return fmt.Errorf("raw boot: %w", err)
		}
		name := fmt.Sprintf("clone-%d", i)
		uid, took, err := b.run(ctx, name)
		if err != nil {
			return err
		}
		c, err := cloneCPU(uid)
		if err != nil {
			return fmt.Errorf("pod %s: %w", name, err)
		}
		told, err := b.startOf(ctx, name)
		if err != nil {
			return err
		}
		ours := covered(told.Phases, "network", "image", "vm", "agent", "container")
		say("clone %d of %d: raw boot %.0f ms, running after %.0f ms, %.0f of them the kubelet's own", i, n, r, took, took-ours)
		if i > 0 {
			raw, whole, kubelet = append(raw, r), append(whole, took), append(kubelet, took-ours)
			rawCPU, cpu = append(rawCPU, rc), append(cpu, c)
			machine = append(machine, covered(told.Phases, "network", "image", "vm", "agent"))
			container = append(container, covered(told.Phases, "container"))
		}
		if err := b.remove(ctx, name); err != nil {
			return err
		}
	}
	base := all.add("pod_running_raw_boot", "ms", raw).Median
	r := all.add("pod_running_clone", "ms", whole)
	r.to(*all, "pod_running_raw_boot", 0.6)
	r.also("p99 <= 1 x", r.P99 <= base)
	all.add("pod_running_clone_kubelet", "ms", kubelet).to(*all, "pod_running_raw_boot", 0)
	all.add("pod_running_clone_vm", "ms", machine).to(*all, "pod_running_raw_boot", 0)
	all.add("pod_running_clone_container", "ms", container).to(*all, "pod_running_raw_boot", 0)
	all.add("pod_running_raw_boot_cpu", "ms", rawCPU)
	all.add("pod_running_clone_cpu", "ms", cpu).to(*all, "pod_running_raw_boot_cpu", 0)
	return nil
}

// cloneCPU is the CPU time in ms that a pod's VM has used; it must be a clone.
func cloneCPU(uid string) (float64, error) {
	pid, err := vmProcess(uid)
	if err != nil {
		return 0, err
	}
	cpu, err := runTime(pid)
	if err != nil {
		return 0, err
	}
	return cpu, launchedAs(uid, true)
}

// awaitTemplate starts pods until one is a clone. The first one pulls the image.
func (b *podBench) awaitTemplate(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, templateTimeout)
	defer cancel()
	say("waiting for a template")
	for i := 0; ; i++ {
		name := fmt.Sprintf("first-%d", i)
		uid, _, err := b.run(ctx, name)
		if err != nil {
			return err
		}
		cloned, err := isClone(uid)
		if err != nil {
			return err
		}
		if err := b.remove(ctx, name); err != nil || cloned {
			return err
		}
		if err := sleep(ctx, 3*time.Second); err != nil {
			return fmt.Errorf("pods were booted, not cloned, for %s: %w", templateTimeout, err)
		}
	}
}

// startOf reads what a Pod tells of its start, which is written to it a little
// after its status.
func (b *podBench) startOf(ctx context.Context, name string) (v1alpha1.PodStart, error) {
	var s v1alpha1.PodStart
	for range 100 {
		p, err := b.client.CoreV1().Pods(benchNamespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return s, err
		}
		if text := p.Annotations[v1alpha1.StartAnnotation]; text != "" {
			return s, json.Unmarshal([]byte(text), &s)
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return s, err
		}
	}
	return s, fmt.Errorf("pod %s does not tell of its start", name)
}

// covered is for how many milliseconds one of the phases was under way.
func covered(phases []v1alpha1.StartPhase, names ...string) float64 {
	var some []v1alpha1.StartPhase
	for _, p := range phases {
		if slices.Contains(names, p.Name) {
			some = append(some, p)
		}
	}
	slices.SortFunc(some, func(a, b v1alpha1.StartPhase) int { return int(a.From - b.From) })
	var sum, end int64
	for _, p := range some {
		from, to := max(p.From, end), p.From+p.Took
		if to > from {
			sum, end = sum+to-from, to
		}
	}
	return float64(sum)
}

// createAll creates pods at once and returns after how many milliseconds each
// was running, by name.
func (b *podBench) createAll(ctx context.Context, names []string) (took map[string]float64, uids map[string]string, err error) {
	ctx, cancel := context.WithTimeout(ctx, burstTimeout)
	defer cancel()
	w, err := b.client.CoreV1().Pods(benchNamespace).Watch(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, nil, err
	}
	defer w.Stop()
	start := time.Now()
	created := make(chan error, len(names))
	for _, name := range names {
		go func() {
			_, err := b.create(ctx, name, pauseImage, nil)
			created <- err
		}()
	}
	took, uids = map[string]float64{}, map[string]string{}
	for len(took) < len(names) {
		select {
		case err := <-created:
			if err != nil {
				return nil, nil, err
			}
		case e, ok := <-w.ResultChan():
			if !ok {
				return nil, nil, fmt.Errorf("%d of %d pods run after %s", len(took), len(names), time.Since(start).Round(time.Second))
			}
			if name, uid, ok := running(e.Object); ok && took[name] == 0 && slices.Contains(names, name) {
				took[name], uids[name] = ms(start), uid
			}
		}
	}
	return took, uids, nil
}

// removeAll deletes pods and waits until the last is gone.
func (b *podBench) removeAll(ctx context.Context, prefix string) error {
	ctx, cancel := context.WithTimeout(ctx, burstTimeout)
	defer cancel()
	pods := b.client.CoreV1().Pods(benchNamespace)
	for first := true; ; first = false {
		list, err := pods.List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		left := 0
		for _, p := range list.Items {
			if !strings.HasPrefix(p.Name, prefix) {
				continue
			}
			if left++; first {
				if err := pods.Delete(ctx, p.Name, metav1.DeleteOptions{}); err != nil {
					return err
				}
			}
		}
		if left == 0 {
			return nil
		}
		if err := sleep(ctx, 200*time.Millisecond); err != nil {
			return fmt.Errorf("%d pods are still there: %w", left, err)
		}
	}
}
