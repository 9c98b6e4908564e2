package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/openatoll/atoll/vmpod/qemu"
)

// templateTimeout bounds the wait for a template: a boot, its saving and its
// verification, behind whatever else runs.
const templateTimeout = 5 * time.Minute

// isClone says whether a pod's VM was cloned from a template: its QEMU was
// started to be loaded.
func isClone(uid string) (bool, error) {
	pid, err := vmProcess(uid)
	if err != nil {
		return false, err
	}
	argv, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	return bytes.Contains(argv, []byte("\x00-incoming\x00")), err
}

// launchedAs says what is wrong if a pod's VM is a clone and should have been
// booted, or the other way round.
func launchedAs(uid string, clone bool) error {
	cloned, err := isClone(uid)
	switch {
	case err != nil:
		return err
	case cloned && !clone:
		return errCloned
	case clone && !cloned:
		return errCold
	}
	return nil
}

// errCloned is a VM that was cloned where a boot was to be measured.
var errCloned = errors.New("a VM was cloned, not booted")

// errCold is a VM that was booted where a clone was to be measured.
var errCold = errors.New("a VM was booted, not cloned")

// clones takes raw boots and launches of clones turn by turn.
func (b *vmBench) clones(ctx context.Context, n int, all *results) (err error) {
	driver, err := b.newDriver("-clone", qemu.Templates{Enabled: true, Sizes: []qemu.Size{{CPUs: 1, Memory: benchMemory}}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, driver.Close()) }()
	say("waiting for a template")
	wait, cancel := context.WithTimeout(ctx, templateTimeout)
	defer cancel()
	for cloned := false; !cloned; {
		_, _, origin, err := b.launch(wait, driver)
		if err != nil {
			return err
		}
		if cloned = origin.Cloned; !cloned {
			if err := sleep(wait, time.Second); err != nil {
				return fmt.Errorf("%w: no template within %s", err, templateTimeout)
			}
		}
	}
	var raw, clone, rawCPU, cloneCPU []float64
	for i := range n + 1 {
		r, rc, err := b.rawBoot(ctx)
		if err != nil {
			return fmt.Errorf("raw boot: %w", err)
		}
		c, cc, origin, err := b.launch(ctx, driver)
		if err == nil && !origin.Cloned {
			err = fmt.Errorf("%w: %s", errCold, origin.Reason)
		}
		if err != nil {
			return fmt.Errorf("launch of a clone: %w", err)
		}
		say("clone %d of %d: raw boot %.0f ms, clone %.0f ms", i, n, r, c)
		if i > 0 {
			raw, clone = append(raw, r), append(clone, c)
			rawCPU, cloneCPU = append(rawCPU, rc), append(cloneCPU, cc)
		}
	}
	all.add("clone_raw_boot", "ms", raw)
	all.add("clone_agent", "ms", clone).to(*all, "clone_raw_boot", 0.15)
	all.add("clone_raw_boot_cpu", "ms", rawCPU)
	all.add("clone_agent_cpu", "ms", cloneCPU).to(*all, "clone_raw_boot_cpu", 0)
	return nil
}

// rawBoots boots so many machines by hand at once and returns after how many
// milliseconds the last of them had PID 1.
func (b *vmBench) rawBoots(ctx context.Context, n int) (float64, error) {
	start := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for range n {
		g.Go(func() error {
			_, _, err := b.rawBoot(ctx)
			return err
		})
	}
	err := g.Wait()
	return ms(start), err
}

// sleep waits, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
