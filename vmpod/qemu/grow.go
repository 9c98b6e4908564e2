package qemu

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod"
)

// Why virtio-mem, and what room to grow costs: docs/decisions/0006-growth.md.
const (
	growDevice  = "grow"    // the virtio-mem device, plugged when first needed
	growBackend = "growram" // its memory
	growStep    = 4 << 20   // bytes; the largest block by which guests take it
	// reserveCPUs is how many more CPUs a VM may get than it was launched with,
	// or as many again as it has, whichever is more.
	reserveCPUs = 3
	// maxGrown bounds what VMs may grow to: emulated CPUs have 40 bits of
	// physical addresses, and PCI needs some of them.
	maxGrown = 512 << 30
)

// room is what a VM can grow to: its maxima on the command line, and the
// host's size if nothing else is configured.
func (c Config) room(s vmpod.Spec) (cpus int, memory int64) {
	cpus = max(s.CPUs, min(s.CPUs+max(reserveCPUs, s.CPUs), c.GrowCPUs, maxCPUs))
	base := memoryMiB(s) << 20
	// Rounded up: who asks for the whole host is not to miss it by a step.
	memory = base + (max(min(c.GrowMemory, maxGrown)-base, 0)+growStep-1)/growStep*growStep
	return cpus, memory
}

// growDefaults fills in the host's size.
func (c *Config) growDefaults() error {
	if c.GrowCPUs <= 0 {
		c.GrowCPUs = runtime.NumCPU()
	}
	if c.GrowMemory <= 0 {
		total, _, err := hostMemory()
		if err != nil {
			return err
		}
		c.GrowMemory = total
	}
	return nil
}

// hostMemory returns the host's RAM and what of it is available, in bytes.
func hostMemory() (total, available int64, err error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		fields := strings.Fields(sc.Text())
		if len(fields) < 2 {
			continue
		}
		kib, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			continue
		}
		switch fields[0] {
		case "MemTotal:":
			total = kib << 10
		case "MemAvailable:":
			return total, kib << 10, nil
		}
	}
	return 0, 0, errors.New("/proc/meminfo does not tell the host's memory")
}

// A cpuSlot is one entry of query-hotpluggable-cpus.
type cpuSlot struct {
	Type  string         `json:"type"`
	Props map[string]int `json:"props"`
	// Path is empty if there is no CPU in it.
	Path string `json:"qom-path"`
}

// A growth is what QEMU says of a machine's size.
type growth struct {
	vmpod.Extent
	base   int64     // RAM of the launch, bytes
	device bool      // the virtio-mem device is there
	free   []cpuSlot // in the order in which they are to be filled
}

// inspect asks QEMU. What the guest was offered counts, taken or not.
func (m *Machine) inspect(ctx context.Context, q *qmpConn) (growth, error) {
	var g growth
	var cpus []cpuSlot
	if err := q.run(ctx, "query-hotpluggable-cpus", nil, &cpus); err != nil {
		return g, err
	}
	g.MaxCPUs = len(cpus)
	for i := len(cpus) - 1; i >= 0; i-- { // QEMU lists the last one first
		if cpus[i].Path == "" {
			g.free = append(g.free, cpus[i])
		}
	}
	g.CPUs = g.MaxCPUs - len(g.free)
	var sum struct {
		Base int64 `json:"base-memory"`
	}
	if err := q.run(ctx, "query-memory-size-summary", nil, &sum); err != nil {
		return g, err
	}
	var devices []struct {
		Type string `json:"type"`
		Data struct {
			ID        string `json:"id"`
			Requested int64  `json:"requested-size"`
			Max       int64  `json:"max-size"`
		} `json:"data"`
	}
	if err := q.run(ctx, "query-memory-devices", nil, &devices); err != nil {
		return g, err
	}
	g.base, g.Memory = sum.Base, sum.Base
	// Of the two maxima only that of a device can be asked; a VM of an older
	// version, whose record has none, cannot grow.
	g.MaxMemory = max(sum.Base, m.proc.MaxMemory)
	for _, d := range devices {
		if d.Type == "virtio-mem" && d.Data.ID == growDevice {
			g.device, g.Memory, g.MaxMemory = true, sum.Base+d.Data.Requested, sum.Base+d.Data.Max
		}
	}
	m.mu.Lock()
	m.extent = &g.Extent
	m.mu.Unlock()
	return g, nil
}

// Extent implements vmpod.Grower.
func (m *Machine) Extent(ctx context.Context) (vmpod.Extent, error) {
	q, err := m.monitor(ctx)
	if err != nil {
		return vmpod.Extent{}, m.growError(err)
	}
	g, err := m.inspect(ctx, q)
	return g.Extent, m.growError(err)
}

// Grow implements vmpod.Grower.
func (m *Machine) Grow(ctx context.Context, cpus int, memory int64) error {
	if cpus < 0 || memory < 0 {
		return m.growError(fmt.Errorf("%d CPUs, %d bytes: want none negative: %w", cpus, memory, errdefs.ErrInvalidArgument))
	}
	m.plugging.Lock()
	defer m.plugging.Unlock()
	q, err := m.monitor(ctx)
	if err != nil {
		return m.growError(err)
	}
	return m.growError(m.grow(ctx, q, cpus, memory))
}

// growError names the machine; a QEMU that does not answer, or is gone, is
// unavailable.
func (m *Machine) growError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errQMPClosed):
		err = fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return fmt.Errorf("pod VM %s: grow: %w", m.id, err)
}

func (m *Machine) grow(ctx context.Context, q *qmpConn, cpus int, memory int64) error {
	have, err := m.inspect(ctx, q)
	if err != nil {
		return err
	}
	cpus, memory = max(cpus, have.CPUs), max(memory, have.Memory)
	if err := admit(have.Extent, cpus, memory); err != nil {
		return err
	}
	if memory > have.Memory {
		memory = min(have.base+(memory-have.base+growStep-1)/growStep*growStep, have.MaxMemory)
	}
	if cpus == have.CPUs && memory == have.Memory {
		return nil
	}
	// The limits first: a guest may take what it is offered at once.
	if err := m.allow(cpus, memory); err != nil {
		return err
	}
	if memory > have.Memory {
		if err := m.offerMemory(ctx, q, have, memory); err != nil {
			return err
		}
	}
	for _, slot := range have.free[:cpus-have.CPUs] {
		if err := q.run(ctx, "device_add", cpuDevice(slot), nil); err != nil {
			return err
		}
	}
	if _, err = m.inspect(ctx, q); err == nil {
		m.log.Info("pod VM has grown", "cpus", cpus, "memory", memory, "cpus_before", have.CPUs, "memory_before", have.Memory)
	}
	return err
}

// admit refuses what the machine or the host has no room for.
func admit(have vmpod.Extent, cpus int, memory int64) error {
	if cpus > have.MaxCPUs {
		return fmt.Errorf("%d CPUs: it was launched with %d, and can have %d at most: recreate the pod to get more: %w",
			cpus, have.CPUs, have.MaxCPUs, errdefs.ErrResourceExhausted)
	}
	if memory > have.MaxMemory {
		return fmt.Errorf("%d MiB of memory: it has %d, and can have %d at most: recreate the pod to get more: %w",
			memory>>20, have.Memory>>20, have.MaxMemory>>20, errdefs.ErrResourceExhausted)
	}
	if memory == have.Memory {
		return nil
	}
	_, available, err := hostMemory()
	if err != nil {
		return err
	}
	if more := memory - have.Memory; more > available {
		return fmt.Errorf("%d MiB more of memory: the host has %d MiB left: free some, or run the pod on another node: %w",
			more>>20, available>>20, errdefs.ErrResourceExhausted)
	}
	return nil
}

// offerMemory has the guest see so much RAM, in bytes. The device is as large
// as it may ever become: its size is address space, of which QEMU has nothing
// reserved and the guest uses what it was offered.
func (m *Machine) offerMemory(ctx context.Context, q *qmpConn, have growth, memory int64) error {
	requested := memory - have.base
	if have.device {
		return q.run(ctx, "qom-set", map[string]any{"path": "/machine/peripheral/" + growDevice, "property": "requested-size", "value": requested}, nil)
	}
	backend := map[string]any{"qom-type": "memory-backend-ram", "id": growBackend, "size": have.MaxMemory - have.base, "reserve": false}
	if m.proc.SharedMemory { // as the RAM of the launch: see command.memoryBackend
		backend["qom-type"], backend["share"] = "memory-backend-memfd", true
	}
	err := q.run(ctx, "object-add", backend, nil)
	var refused *qmpError
	if errors.As(err, &refused) && !strings.Contains(refused.Desc, "duplicate") { // left by a process that died right here
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	}
	if err != nil && refused == nil {
		return err
	}
	err = q.run(ctx, "device_add", map[string]any{
		"driver": "virtio-mem-pci", "id": growDevice, "memdev": growBackend, "requested-size": requested,
		"bus": plugBus, "addr": plugAddress(growSlot), "disable-legacy": "on",
	}, nil)
	if err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.d.cfg.Deadline)
		defer cancel()
		_ = q.run(undo, "object-del", map[string]any{"id": growBackend}, nil) // in use if it was added after all
	}
	return err
}

// cpuDevice fills a slot. Its name is the slot's, so that two attempts cannot
// fill one twice.
func cpuDevice(s cpuSlot) map[string]any {
	d := map[string]any{"driver": s.Type, "id": "cpu-" + strconv.Itoa(s.Props["core-id"])}
	for k, v := range s.Props {
		d[k] = v
	}
	return d
}

// overhead is what QEMU may need on the host beside the guest's RAM, in bytes.
func (m *Machine) overhead() int64 {
	if m.proc.Overhead > 0 {
		return m.proc.Overhead
	}
	return m.d.cfg.Overhead
}

// allow raises the limits of the VM's cgroups; a host without has none.
func (m *Machine) allow(cpus int, memory int64) error {
	m.mu.Lock()
	dirs := m.proc.Cgroups
	m.mu.Unlock()
	for _, h := range m.d.trees {
		for _, dir := range dirs {
			if !strings.HasPrefix(dir, h.root+"/") {
				continue
			}
			if err := h.limit(dir, limits{memory: memory + m.overhead(), cpus: cpus}); err != nil {
				return err
			}
		}
	}
	return nil
}
