package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	densityPods = 200
	// densityMemory is what of the host's memory is left, in bytes.
	densityMemory = 2 << 30
	// densityEnds is of how many starts, the first and the last, the medians
	// are compared.
	densityEnds = 10
)

// forgetFiles has the host's kernel drop what it has cached of files, so that
// the last pods do not pay for what others read before the first: what a build
// left there is taken back page by page.
func forgetFiles() error {
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0)
}

// density starts pods that do nothing, one after another, until there are
// densityPods or the host has little memory left. Requests do not bound them:
// they name none.
func (b *podBench) density(ctx context.Context, all *results) error {
	if err := b.awaitTemplate(ctx); err != nil {
		return err
	}
	if err := forgetFiles(); err != nil {
		say("what the host has cached of files stays: %v", err)
	}
	before, err := memAvailable()
	if err != nil {
		return err
	}
	var starts []float64
	uids := map[string]string{}
	left := before
	for len(starts) < densityPods && left >= densityMemory {
		name := fmt.Sprintf("dense-%d", len(starts))
		uid, took, err := b.run(ctx, name)
		if err != nil {
			return fmt.Errorf("pod %d: %w", len(starts)+1, err)
		}
		starts, uids[name] = append(starts, took), uid
		if left, err = memAvailable(); err != nil {
			return err
		}
		if len(starts)%20 == 0 {
			say("%d pods, the last one running after %.0f ms; %.1f GiB are left", len(starts), starts[len(starts)-1], left/(1<<30))
		}
	}
	if err := b.allRun(ctx, uids); err != nil {
		return err
	}
	all.add("density", "pods", []float64{float64(len(starts))}).least(densityPods)
	all.add("density_first_starts", "ms", starts[:min(len(starts), densityEnds)])
	all.add("density_last_starts", "ms", starts[max(0, len(starts)-densityEnds):]).to(*all, "density_first_starts", 2)
	all.add("density_memory", "MiB", []float64{(before - left) / (1 << 20) / float64(len(starts))})
	return b.removeAll(ctx, "dense-")
}

// allRun makes sure that the first pods have not given way to the last.
func (b *podBench) allRun(ctx context.Context, uids map[string]string) error {
	list, err := b.client.CoreV1().Pods(benchNamespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	n := 0
	for i := range list.Items {
		p := &list.Items[i]
		name, uid, ok := running(p)
		if uids[name] != uid {
			continue
		}
		if !ok || p.Status.ContainerStatuses[0].RestartCount > 0 {
			return fmt.Errorf("pod %s, one of %d, is %s after %d restarts", name, len(uids), p.Status.Phase, p.Status.ContainerStatuses[0].RestartCount)
		}
		n++
	}
	if n != len(uids) {
		return fmt.Errorf("%d of %d pods are there", n, len(uids))
	}
	return nil
}

// nodeNames are the cluster's nodes.
func (b *podBench) nodeNames(ctx context.Context) ([]string, error) {
	list, err := b.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	var names []string
	for _, n := range list.Items {
		names = append(names, n.Name)
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("the cluster has no node")
	}
	return names, nil
}

// memAvailable is what the host could give to processes, in bytes.
func memAvailable() (float64, error) {
	text, err := field("/proc/meminfo", "MemAvailable")
	if err != nil {
		return 0, err
	}
	kb, _, _ := strings.Cut(text, " ")
	v, err := strconv.ParseFloat(kb, 64)
	return v * 1024, err
}
