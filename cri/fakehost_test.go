package cri

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/openatoll/atoll/netplugin"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// A fakeHost stands for everything below cri on one host. It outlives servers,
// as machines outlive processes.
type fakeHost struct {
	newGuest    func(*fakeGuest) // changes those of machines to come
	mu          sync.Mutex
	fail        map[string]error         // by step
	hold        map[string]chan struct{} // steps that wait
	machines    map[vmpod.ID]*fakeMachine
	attachments map[string]netplugin.Attachment
	disks       map[string]int64
	images      map[string]storage.Image
	holds       map[string]int
	launches    int
	volumes     fakeVolumes
	began       time.Time
	starved     atomic.Bool                  // its machines get no CPU
	ran         atomic.Uint64                // CPU time of its machines, in ns, beyond the first 5 s
	touched     atomic.Uint64                // memory of its machines
	status      atomic.Pointer[vmpod.Status] // of its machines; nil: they run
}

func newFakeHost() *fakeHost {
	return &fakeHost{
		began: time.Now(),
		fail:  map[string]error{}, hold: map[string]chan struct{}{},
		machines: map[vmpod.ID]*fakeMachine{}, attachments: map[string]netplugin.Attachment{}, disks: map[string]int64{}, holds: map[string]int{},
		images: map[string]storage.Image{
			"atoll.local/web:1": {
				ID: "sha256:web", Tags: []string{"atoll.local/web:1"}, Digests: []string{"atoll.local/web@sha256:1"}, Size: 5,
				Config: ocispec.Image{Config: ocispec.ImageConfig{Entrypoint: []string{"/web"}, Cmd: []string{"-v"}, Env: []string{"A=image", "B=image"}, User: "65534", WorkingDir: "/srv", StopSignal: "SIGINT"}},
			},
		},
	}
}

// at is called at every step: it fails or waits as the test wants.
func (h *fakeHost) at(ctx context.Context, step string) error {
	h.mu.Lock()
	err, hold := h.fail[step], h.hold[step]
	h.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return err
}

func (h *fakeHost) set(step string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fail[step] = err
}

// holdAt makes a step wait until release is called.
func (h *fakeHost) holdAt(step string) (release func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := make(chan struct{})
	h.hold[step] = c
	return func() { close(c) }
}

// left lists what is on the host.
func (h *fakeHost) left() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []string
	for id := range h.machines {
		out = append(out, "machine "+id.String())
	}
	for k := range h.attachments {
		out = append(out, "attachment "+k)
	}
	for k := range h.disks {
		out = append(out, "disk "+k)
	}
	for k := range h.holds {
		out = append(out, "image hold "+k)
	}
	slices.Sort(out)
	return out
}

func (h *fakeHost) guest(uid string) *fakeGuest {
	h.mu.Lock()
	defer h.mu.Unlock()
	for id, m := range h.machines {
		if id.PodUID == uid {
			return m.guest
		}
	}
	return nil
}

// driver

type fakeDriver struct{ *fakeHost }

func (d fakeDriver) Launch(ctx context.Context, spec vmpod.Spec) (vmpod.Machine, error) {
	if err := d.at(ctx, "launch"); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if m := d.machines[spec.ID]; m != nil {
		return m, nil
	}
	m := &fakeMachine{host: d.fakeHost, spec: spec, off: make(chan struct{}), guest: newFakeGuest(d.fakeHost)}
	if d.newGuest != nil {
		d.newGuest(m.guest)
	}
	d.machines[spec.ID] = m
	d.launches++
	return m, nil
}

func (d fakeDriver) Open(_ context.Context, id vmpod.ID) (vmpod.Machine, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if m := d.machines[id]; m != nil {
		return m, nil
	}
	return nil, fmt.Errorf("machine %s: %w", id, errdefs.ErrNotFound)
}

func (d fakeDriver) List(ctx context.Context) ([]vmpod.Machine, error) {
	if err := d.at(ctx, "list"); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []vmpod.Machine
	for _, m := range d.machines {
		out = append(out, m)
	}
	return out, nil
}

type fakeMachine struct {
	host  *fakeHost
	spec  vmpod.Spec
	guest *fakeGuest

	mu   sync.Mutex
	conn net.Conn
	once sync.Once
	off  chan struct{}
	exit vmpod.Exit
}

func (m *fakeMachine) Spec() vmpod.Spec {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.spec
	s.Disks = slices.Clone(s.Disks)
	return s
}

func (m *fakeMachine) Status(ctx context.Context) (vmpod.Status, error) {
	if err := m.host.at(ctx, "status"); err != nil {
		return vmpod.Status{State: vmpod.StateUnknown, Reason: vmpod.ReasonVMMNotResponding, Message: err.Error()}, nil
	}
	if status := m.host.status.Load(); status != nil {
		return *status, nil
	}
	return vmpod.Status{State: vmpod.StateRunning}, nil
}

// Progress tells that the machine has waited all the time, if it is starved.
func (m *fakeMachine) Progress(context.Context) (vmpod.Progress, error) {
	p := vmpod.Progress{Waited: map[int]time.Duration{1: 0}}
	if m.host.starved.Load() {
		p.Waited[1] = time.Since(m.host.began)
	}
	return p, nil
}

func (m *fakeMachine) Dial(ctx context.Context) (net.Conn, error) {
	if err := m.host.at(ctx, "dial"); err != nil {
		return nil, err
	}
	host, guest := net.Pipe()
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-m.off:
		return nil, errdefs.ErrUnavailable
	default:
	}
	if m.conn != nil {
		m.conn.Close()
	}
	m.conn = guest
	go agentapi.Serve(context.Background(), guest, m.guest, func(string, ...any) {})
	return host, nil
}

func (m *fakeMachine) die(e vmpod.Exit) {
	m.once.Do(func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.exit = e
		m.exit.At = time.Now()
		if m.conn != nil {
			m.conn.Close()
		}
		close(m.off)
	})
}

func (m *fakeMachine) Wait(ctx context.Context) (vmpod.Exit, error) {
	select {
	case <-m.off:
		return m.exit, nil
	case <-ctx.Done():
		return vmpod.Exit{}, ctx.Err()
	}
}

func (m *fakeMachine) Stop(ctx context.Context, _ time.Duration) error {
	if err := m.host.at(ctx, "stop"); err != nil {
		return err
	}
	m.host.volumes.note("stop machine")
	m.die(vmpod.Exit{Reason: vmpod.ExitStopped, Message: "asked for"})
	return nil
}

func (m *fakeMachine) Remove(ctx context.Context) error {
	if err := m.host.at(ctx, "remove"); err != nil {
		return err
	}
	m.die(vmpod.Exit{Reason: vmpod.ExitStopped, Message: "removed"})
	m.host.volumes.note("remove machine")
	m.host.mu.Lock()
	defer m.host.mu.Unlock()
	delete(m.host.machines, m.spec.ID)
	return nil
}

func (m *fakeMachine) Plug(ctx context.Context, d vmpod.Device) error {
	if err := m.host.at(ctx, "plug"); err != nil {
		return err
	}
	if d.Disk.Volume != nil {
		m.host.volumes.note("plug")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.spec.Disks = append(m.spec.Disks, *d.Disk)
	return nil
}

func (m *fakeMachine) Unplug(context.Context, string) error { return nil }

func (m *fakeMachine) Counters(context.Context) (vmpod.Usage, error) {
	return vmpod.Usage{Time: time.Now(), CPU: 5e9 + m.host.ran.Load(), Resident: m.host.touched.Load()}, nil
}

// Usage is what statistics must not ask for.
func (m *fakeMachine) Usage(context.Context) (vmpod.Usage, error) {
	return vmpod.Usage{}, errdefs.ErrNotImplemented
}

// network

type fakeNetwork struct{ *fakeHost }

func (n fakeNetwork) Configure(context.Context, []netip.Prefix) error { return nil }
func (n fakeNetwork) Ready(context.Context) error                     { return nil }
func (n fakeNetwork) Attach(ctx context.Context, r netplugin.Request) (netplugin.Attachment, error) {
	if err := n.at(ctx, "attach"); err != nil {
		return netplugin.Attachment{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	a := netplugin.Attachment{
		Key: r.Key, Tap: "atl1", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, MTU: 1500, HostPorts: r.HostPorts,
		Addresses: []netip.Prefix{netip.MustParsePrefix("198.19.0.2/32")},
		Routes:    []netplugin.Route{{Destination: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("169.254.1.1")}},
	}
	n.attachments[r.Key] = a
	return a, nil
}
func (n fakeNetwork) Detach(ctx context.Context, key string) error {
	if err := n.at(ctx, "detach"); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.attachments, key)
	return nil
}
func (n fakeNetwork) List(context.Context) ([]netplugin.Attachment, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []netplugin.Attachment
	for _, a := range n.attachments {
		out = append(out, a)
	}
	return out, nil
}

// storage

type fakeImages struct{ *fakeHost }

func (i fakeImages) Pull(ctx context.Context, ref string, _ *storage.Auth, _ func(storage.Progress)) (storage.Image, error) {
	return i.Get(ctx, ref)
}
func (i fakeImages) Get(_ context.Context, ref string) (storage.Image, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for tag, img := range i.images {
		if ref == tag || ref == img.ID || slices.Contains(img.Digests, ref) {
			return img, nil
		}
	}
	return storage.Image{}, fmt.Errorf("image %q: %w", ref, errdefs.ErrNotFound)
}
func (i fakeImages) List(context.Context) ([]storage.Image, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	var out []storage.Image
	for _, img := range i.images {
		out = append(out, img)
	}
	return out, nil
}
func (i fakeImages) Remove(context.Context, string) error { return nil }
func (i fakeImages) Disk(ctx context.Context, id, user string) (storage.ImageDisk, error) {
	if err := i.at(ctx, "image disk"); err != nil {
		return storage.ImageDisk{}, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.holds[user]++
	return storage.ImageDisk{ID: "img-" + strings.TrimPrefix(id, "sha256:"), Path: "/images/" + id, Format: "vmdk", FSType: "erofs"}, nil
}
func (i fakeImages) Release(ctx context.Context, user string) error {
	if err := i.at(ctx, "release"); err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.holds, user)
	return nil
}
func (i fakeImages) Usage(context.Context) (storage.Usage, error) {
	return storage.Usage{Path: "/", Bytes: 7, Inodes: 3}, nil
}

type fakeEphemeral struct{ *fakeHost }

func (e fakeEphemeral) Create(ctx context.Context, key string, n int64) (string, error) {
	if err := e.at(ctx, "ephemeral"); err != nil {
		return "", err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.disks[key] = n
	return "/disks/" + key, nil
}
func (e fakeEphemeral) Remove(ctx context.Context, key string) error {
	if err := e.at(ctx, "remove disk"); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.disks, key)
	return nil
}
func (e fakeEphemeral) List(context.Context) ([]string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []string
	for k := range e.disks {
		out = append(out, k)
	}
	return out, nil
}
func (e fakeEphemeral) Usage(context.Context, string) (storage.Usage, error) {
	return storage.Usage{Path: "/", Bytes: 11}, nil
}

// guest
