package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/vmpod"
)

// templateNice is the priority of what makes templates: pods go first.
const templateNice = 10

// templateCommand is the command line of a template, and of its clones.
func (d *Driver) templateCommand(s shape, ram *os.File, clone bool) command {
	c := d.command(s.spec(vmpod.ID{}))
	c.ram, c.clone = ram, clone
	return c
}

// makeTemplate boots, saves, seals and tries a template.
func (d *Driver) makeTemplate(ctx context.Context, from *nowhere, s shape, name string) (_ *template, err error) {
	ram, err := newRAM(s.memory)
	if err != nil {
		return nil, err
	}
	t := &template{shape: s, name: name, ram: ram, made: time.Now()}
	t.state = d.stateFile(name, t.made)
	defer func() {
		if err != nil {
			d.dropTemplate(t)
		}
	}()
	if err := d.bootTemplate(ctx, from, t); err != nil {
		return nil, err
	}
	if err := seal(ram); err != nil {
		return nil, err
	}
	if t.digest, err = digestOf(ram); err != nil {
		return nil, err
	}
	t.bytes = used(ram)
	if err := d.tryTemplate(ctx, from, t); err != nil {
		return nil, fmt.Errorf("verification: %w", err)
	}
	if err := d.recordTemplate(t); err != nil {
		return nil, err
	}
	failpoint.Hit(failpoint.TemplateRecorded)
	return t, nil
}

// bootTemplate fills a template's RAM and writes its state.
func (d *Driver) bootTemplate(ctx context.Context, from *nowhere, t *template) error {
	vm, err := d.startScratch(ctx, scratchTemplate, d.templateCommand(t.shape, t.ram, false), from, true)
	if err != nil {
		return err
	}
	defer vm.end()
	failpoint.Hit(failpoint.TemplateStarted)
	if err := d.probe(ctx, vm, templateBoot); err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	settling, cancel := context.WithTimeout(ctx, templateSettle)
	defer cancel()
	if err := vm.settle(settling); err != nil {
		return err
	}
	state, err := os.OpenFile(t.state, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer state.Close()
	if err := save(ctx, vm.q, state); err != nil {
		return vm.failure(fmt.Errorf("save: %w", err))
	}
	failpoint.Hit(failpoint.TemplateSaved)
	return nil
}

// probe waits until the agent has answered.
func (d *Driver) probe(ctx context.Context, vm *scratch, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	stop := context.AfterFunc(d.life, cancel)
	defer stop()
	go func() { // a guest that has ended never answers
		select {
		case <-vm.child.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	conn, err := vm.agent(ctx)
	if err == nil {
		err = d.cfg.Templates.Probe(ctx, conn)
	}
	if err == nil {
		return nil
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return vm.failure(fmt.Errorf("the agent has not answered within %v: %w", limit, ctx.Err()))
	}
	return vm.failure(err)
}

// tryTemplate starts a clone, and ends it when its agent has answered.
func (d *Driver) tryTemplate(ctx context.Context, from *nowhere, t *template) error {
	vm, err := d.startScratch(ctx, scratchTrial, d.templateCommand(t.shape, t.ram, true), from, true)
	if err != nil {
		return err
	}
	defer vm.end()
	if err := restore(ctx, vm.q, t); err != nil {
		return vm.failure(err)
	}
	if err := vm.q.run(ctx, "cont", nil, nil); err != nil {
		return vm.failure(err)
	}
	return d.probe(ctx, vm, templateVerify)
}

// migrationCapabilities: RAM stays where it is, and the end is told.
var migrationCapabilities = map[string]any{"capabilities": []map[string]any{
	{"capability": "x-ignore-shared", "state": true}, {"capability": "events", "state": true},
}}

// save stops the guest and writes its devices' state.
func save(ctx context.Context, q *qmpConn, to *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, templateSave)
	defer cancel()
	if err := q.run(ctx, "stop", nil, nil); err != nil {
		return err
	}
	return migrate(ctx, q, "migrate", to)
}

// restore loads a template's devices' state into a QEMU that waits for it.
func restore(ctx context.Context, q *qmpConn, t *template) error {
	ctx, cancel := context.WithTimeout(ctx, templateSave)
	defer cancel()
	state, err := t.openState()
	if err != nil {
		return err
	}
	defer state.Close()
	return migrate(ctx, q, "migrate-incoming", state)
}

func migrate(ctx context.Context, q *qmpConn, command string, file *os.File) error {
	if err := q.run(ctx, "migrate-set-capabilities", migrationCapabilities, nil); err != nil {
		return err
	}
	// A clone is not a VM that has moved, which the network would have to know.
	if err := q.run(ctx, "migrate-set-parameters", map[string]any{"announce-rounds": 0}, nil); err != nil {
		return err
	}
	events, unwatch := q.watch("MIGRATION")
	defer unwatch()
	if err := q.run(ctx, "getfd", map[string]any{"fdname": "state"}, nil, file); err != nil {
		return err
	}
	if err := q.run(ctx, command, map[string]any{"uri": "fd:state"}, nil); err != nil {
		return err
	}
	for {
		select {
		case ev := <-events:
			var d struct {
				Status string `json:"status"`
			}
			_ = json.Unmarshal(ev.Data, &d)
			switch d.Status {
			case "completed":
				return nil
			case "failed", "cancelled":
				var info struct {
					Error string `json:"error-desc"`
				}
				_ = q.run(ctx, "query-migrate", nil, &info)
				return fmt.Errorf("QEMU's %s %s: %s: %w", command, d.Status, info.Error, errdefs.ErrUnknown)
			}
		case <-q.done:
			return fmt.Errorf("QEMU ended in %s: %w", command, errQMPClosed)
		case <-ctx.Done():
			return fmt.Errorf("QEMU does not finish %s: %w", command, ctx.Err())
		}
	}
}

// Files below templateDir, which go with the host's boot: NAME.TIME.state and
// NAME.json, and what scratches say.
const (
	stateSuffix  = ".state"
	recordSuffix = ".json"
	stderrSuffix = ".stderr"
)

func (d *Driver) templateDir() string { return filepath.Join(d.cfg.RunDir, "templates") }

func (d *Driver) templateFile(name, suffix string) string {
	return filepath.Join(d.templateDir(), name+suffix)
}

// stateFile is a template's own: one of the same name may still be in use when
// it is made anew.
func (d *Driver) stateFile(name string, made time.Time) string {
	return d.templateFile(name+"."+strconv.FormatInt(made.UnixNano(), 36), stateSuffix)
}

// A templateRecord is by what a driver knows an earlier one's template, whose
// RAM is left only in its clones.
type templateRecord struct {
	CPUs   int    `json:"cpus"`
	Memory int64  `json:"memory"`
	Tenant string `json:"tenant,omitempty"`
	// Furnished: with a disk and a NIC.
	Furnished bool      `json:"furnished,omitempty"`
	Digest    string    `json:"digest"` // of the RAM
	State     string    `json:"state"`  // likewise, of the file
	Bytes     int64     `json:"bytes"`
	Made      time.Time `json:"made"`
}

func (d *Driver) recordTemplate(t *template) error {
	state, err := t.openState()
	if err != nil {
		return err
	}
	defer state.Close()
	r := templateRecord{CPUs: t.shape.cpus, Memory: t.shape.memory, Tenant: t.shape.tenant, Furnished: t.shape.furnished, Digest: t.digest, Bytes: t.bytes, Made: t.made}
	if r.State, err = contentDigest(state); err != nil {
		return err
	}
	return vmDir(d.templateDir()).write(t.name+recordSuffix, r)
}

// dropTemplate forgets a template. Its RAM lasts as long as its clones.
func (d *Driver) dropTemplate(t *template) {
	t.ram.Close()
	os.Remove(t.state)
	var r templateRecord
	if ok, err := vmDir(d.templateDir()).read(t.name+recordSuffix, &r); err != nil || ok && r.Made.Equal(t.made) { // else its successor's
		os.Remove(d.templateFile(t.name, recordSuffix))
	}
}
