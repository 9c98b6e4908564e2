package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// memoryPods is how many sandboxes the host's memory is shared out between.
const memoryPods = 20

// memory measures what of the host's memory sandboxes that do nothing take,
// with the runtime and all that it keeps for them, as clones and booted.
func (b *criBench) memory(ctx context.Context, all *results) error {
	for _, kind := range []struct {
		name   string
		clones bool
	}{{"mem20_cold", false}, {"mem20", true}} {
		samples, err := b.memoryWith(ctx, kind.clones)
		if err != nil {
			return fmt.Errorf("%s: %w", kind.name, err)
		}
		r := all.add(kind.name, "MiB", samples)
		if kind.clones {
			r.to(*all, "mem20_cold", 0.5)
		}
	}
	return nil
}

func (b *criBench) memoryWith(ctx context.Context, clones bool) (samples []float64, err error) {
	if err := b.end(); err != nil {
		return nil, err
	}
	if err := sleep(ctx, 2*time.Second); err != nil {
		return nil, err
	}
	before, err := memAvailable()
	if err != nil {
		return nil, err
	}
	if err := b.spawn(ctx, templates(clones)); err != nil {
		return nil, err
	}
	if clones {
		if err := b.awaitTemplate(ctx); err != nil {
			return nil, err
		}
	}
	err = b.withPods(ctx, memoryPods, func(pods []criPod) error {
		for _, p := range pods {
			if err := launchedAs(p.uid, clones); err != nil {
				return fmt.Errorf("sandbox %s: %w", p.uid, err)
			}
		}
		if err := sleep(ctx, settle); err != nil {
			return err
		}
		for range 10 {
			now, err := memAvailable()
			if err != nil {
				return err
			}
			samples = append(samples, (before-now)/(1<<20))
			time.Sleep(500 * time.Millisecond)
		}
		return nil
	})
	return samples, err
}

// awaitTemplate runs sandboxes until one is a clone.
func (b *criBench) awaitTemplate(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, templateTimeout)
	defer cancel()
	for {
		p, err := b.pod(ctx, pauseImage)
		if err != nil {
			return errors.Join(err, removePod(ctx, b.rt, p))
		}
		cloned, err := isClone(p.uid)
		if err := errors.Join(err, removePod(ctx, b.rt, p)); err != nil || cloned {
			return err
		}
		if err := sleep(ctx, 3*time.Second); err != nil {
			return fmt.Errorf("sandboxes were booted, not cloned, for %s: %w", templateTimeout, err)
		}
	}
}

// templates are the node's settings for cloning VMs, or booting them.
func templates(clone bool) map[string]any {
	return map[string]any{"templates": map[string]any{"enabled": clone}}
}
