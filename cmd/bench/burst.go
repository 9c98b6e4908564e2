package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

const (
	burstPods    = 20
	burstRounds  = 3
	burstTimeout = 10 * time.Minute
	// settle is how long pods rest before what they take is looked at; idleFor
	// is how long it is looked at.
	settle  = 20 * time.Second
	idleFor = time.Minute
)

// burst measures pods that come at once, turn by turn with as many raw boots at
// once, and then what the pods of the last round take while they do nothing.
func (b *podBench) burst(ctx context.Context, vm *vmBench, all *results) error {
	if err := b.awaitTemplate(ctx); err != nil {
		return err
	}
	var raw, last, each []float64
	var uids map[string]string
	for round := range burstRounds {
		r, err := vm.rawBoots(ctx, burstPods)
		if err != nil {
			return fmt.Errorf("%d raw boots at once: %w", burstPods, err)
		}
		names := make([]string, burstPods)
		for i := range names {
			names[i] = fmt.Sprintf("burst-%d-%d", round, i)
		}
		var took map[string]float64
		if took, uids, err = b.createAll(ctx, names); err != nil {
			return err
		}
		longest := 0.0
		for _, t := range took {
			longest = max(longest, t)
			each = append(each, t)
		}
		say("burst %d of %d: raw boots %.0f ms, the last pod running after %.0f ms", round+1, burstRounds, r, longest)
		raw, last = append(raw, r), append(last, longest)
		if round < burstRounds-1 {
			if err := b.removeAll(ctx, "burst-"); err != nil {
				return err
			}
		}
	}
	for name, uid := range uids {
		if err := launchedAs(uid, true); err != nil {
			return fmt.Errorf("pod %s: %w", name, err)
		}
	}
	all.add("burst20_raw_boot", "ms", raw)
	all.add("burst20", "ms", last).to(*all, "burst20_raw_boot", 0.5)
	all.add("burst20_each", "ms", each).to(*all, "burst20_raw_boot", 0)
	if err := b.idle(ctx, uids, all); err != nil {
		return err
	}
	return b.removeAll(ctx, "burst-")
}

// idle measures memory and CPU of pods that do nothing.
func (b *podBench) idle(ctx context.Context, uids map[string]string, all *results) error {
	if err := sleep(ctx, settle); err != nil {
		return err
	}
	pids := map[string]int{}
	before := map[string]float64{}
	for _, uid := range uids {
		pid, err := vmProcess(uid)
		if err != nil {
			return err
		}
		pids[uid] = pid
		if before[uid], err = runTime(pid); err != nil {
			return err
		}
	}
	start := time.Now()
	if err := sleep(ctx, idleFor); err != nil {
		return err
	}
	took := ms(start)
	var cpu, total, monitor, code, tables, guest []float64
	for uid, pid := range pids {
		after, err := runTime(pid)
		if err != nil {
			return err
		}
		cpu = append(cpu, (after-before[uid])/took*100)
		m, err := memoryOf(pid)
		if err != nil {
			return err
		}
		total, monitor, guest = append(total, m.monitor+m.guest), append(monitor, m.monitor), append(guest, m.guest)
		code, tables = append(code, m.code), append(tables, m.tables)
	}
	agents, err := b.agentMemory(ctx, uids)
	if err != nil {
		return err
	}
	r := all.add("pss_clone", "MiB", total)
	r.most(32)
	if m := median(code); m > 1 {
		r.Beside = fmt.Sprintf("and %.0f MiB of code that TCG translated, with %.1f of entries by which it finds it", m, median(tables))
		all.add("pss_clone_tcg", "MiB", code)
		all.add("pss_clone_tcg_tables", "MiB", tables)
	}
	all.add("pss_clone_qemu", "MiB", monitor)
	all.add("pss_clone_guest", "MiB", guest)
	all.add("pss_clone_agent", "MiB", agents)
	all.add("idle_cpu", "% of a core", cpu).most(0.3)
	return nil
}

// agentMemory is what the guests' own processes, which are the agent and
// nothing else, have of anonymous memory, in MiB, by the kubelet's summary.
func (b *podBench) agentMemory(ctx context.Context, uids map[string]string) ([]float64, error) {
	nodes, err := b.nodeNames(ctx)
	if err != nil {
		return nil, err
	}
	text, err := b.client.CoreV1().RESTClient().Get().AbsPath("/api/v1/nodes", nodes[0], "proxy/stats/summary").DoRaw(ctx)
	if err != nil {
		return nil, err
	}
	type memory struct{ RSSBytes float64 }
	var summary struct {
		Pods []struct {
			PodRef     struct{ UID string }
			Memory     memory
			Containers []struct{ Memory memory }
		}
	}
	if err := json.Unmarshal(text, &summary); err != nil {
		return nil, err
	}
	wanted := map[string]bool{}
	for _, uid := range uids {
		wanted[uid] = true
	}
	var out []float64
	for _, p := range summary.Pods {
		if !wanted[p.PodRef.UID] {
			continue
		}
		own := p.Memory.RSSBytes
		for _, c := range p.Containers {
			own -= c.Memory.RSSBytes
		}
		out = append(out, own/(1<<20))
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("the kubelet's summary has none of the %d pods", len(uids))
	}
	return out, nil
}

// running says which pod an event of a watch is about, if that runs.
func running(o runtime.Object) (name, uid string, ok bool) {
	p, is := o.(*corev1.Pod)
	if !is {
		return "", "", false
	}
	ok = len(p.Status.ContainerStatuses) > 0 && !slices.ContainsFunc(p.Status.ContainerStatuses, func(c corev1.ContainerStatus) bool { return c.State.Running == nil })
	return p.Name, string(p.UID), ok
}
