package qemu

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// clonesByTemplate are the processes of clones that run, by the names of their
// templates, as the pods' records have them.
func (d *Driver) clonesByTemplate() map[string][]process {
	records, _ := d.recorded()
	clones := map[string][]process{}
	for _, p := range records {
		if p.Template == "" {
			continue
		}
		if fd, err := p.open(); err == nil {
			fd.Close()
			clones[p.Template] = append(clones[p.Template], p)
		}
	}
	return clones
}

// recover finds templates again that an earlier process made. Their RAM is
// left in the clones that run: it cannot have been changed there, being
// sealed, and is held against its digest because a clone's QEMU could show us
// another. Templates without a clone are made anew.
func (s *templateStore) recover() error {
	entries, err := os.ReadDir(s.d.templateDir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	clones, states := s.d.clonesByTemplate(), map[string]bool{}
	for _, e := range entries {
		name, isRecord := strings.CutSuffix(e.Name(), recordSuffix)
		if !isRecord {
			continue
		}
		t, err := s.recoverOne(name, clones[name])
		if err == nil {
			s.mu.Lock()
			entry := s.entry(t.shape)
			entry.t, entry.lastUsed = t, time.Now()
			entry.set(templateReady)
			s.mu.Unlock()
			states[t.state] = true
			s.log.Info("template is there again", "template", name, "cpus", t.shape.cpus, "memory", t.shape.memory)
			continue
		}
		s.log.Info("template of an earlier process is not used", "template", name, "reason", err)
		os.Remove(s.d.templateFile(name, recordSuffix))
	}
	for _, e := range entries {
		if path := filepath.Join(s.d.templateDir(), e.Name()); strings.HasSuffix(path, stateSuffix) && !states[path] {
			os.Remove(path)
		}
	}
	return nil
}

// recoverOne says why a template cannot be had again.
func (s *templateStore) recoverOne(name string, clones []process) (*template, error) {
	var r templateRecord
	if ok, err := vmDir(s.d.templateDir()).read(name+recordSuffix, &r); !ok || err != nil {
		return nil, fmt.Errorf("no record that can be read: %w", cmp.Or(err, fs.ErrNotExist))
	}
	t := &template{shape: shape{cpus: r.CPUs, memory: r.Memory, tenant: r.Tenant, furnished: r.Furnished}, name: name, digest: r.Digest, bytes: r.Bytes, made: r.Made,
		state: s.d.stateFile(name, r.Made)}
	if key, err := s.d.templateKey(t.shape); err != nil || key != name {
		return nil, fmt.Errorf("of another guest, QEMU or boot: %w", cmp.Or[error](err, errChanged))
	}
	state, err := t.openState()
	if err != nil {
		return nil, err
	}
	defer state.Close()
	if sum, err := contentDigest(state); err != nil || sum != r.State {
		return nil, fmt.Errorf("the devices' state is not what was saved: %w", cmp.Or[error](err, errdefs.ErrDataLoss))
	}
	for _, p := range clones {
		if t.ram = ramOf(p, r.Memory, r.Digest); t.ram != nil {
			return t, nil
		}
	}
	return nil, fmt.Errorf("none of its %d clones has its RAM: %w", len(clones), errdefs.ErrNotFound)
}

// ramOf takes a template's RAM from a clone's descriptors.
func ramOf(p process, size int64, digest string) *os.File {
	links, _ := filepath.Glob("/proc/" + strconv.Itoa(p.PID) + "/fd/*")
	for _, link := range links {
		if target, err := os.Readlink(link); err != nil || !strings.HasPrefix(target, "/memfd:atoll-template") {
			continue
		}
		f, err := os.Open(link)
		if err != nil {
			continue
		}
		if sealed(f, size) {
			if sum, err := digestOf(f); err == nil && sum == digest {
				return f
			}
		}
		f.Close()
	}
	return nil
}
