package cri

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// fakeVolumes is what outlives pods on a fakeHost, and the order of what was
// done with it.
type fakeVolumes struct {
	mu      sync.Mutex
	holders map[string]storage.Holder
	formats map[string]int // by serial: how often it got a file system
	order   []string
}

func (v *fakeVolumes) note(what string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.order = append(v.order, what)
}

// did returns and forgets what was done.
func (v *fakeVolumes) did() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	s := strings.Join(v.order, ", ")
	v.order = nil
	return s
}

func (v *fakeVolumes) held() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return len(v.holders)
}

// blank is the guest's answer for a disk without a file system.
func (v *fakeVolumes) blank(r *agentapi.AddVolumeRequest) *agentapi.AddVolumeResponse {
	if r.Kind != agentapi.AddVolumeRequest_DISK {
		return nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if r.Disk.Block || v.formats[r.Disk.Serial] > 0 {
		v.order = append(v.order, "mount")
		return nil
	}
	v.order = append(v.order, "blank")
	return &agentapi.AddVolumeResponse{Blank: true, Bytes: 1 << 30}
}

type fakeDisks struct{ *fakeHost }

func (d fakeDisks) Attach(ctx context.Context, id string, h storage.Holder, o storage.AttachOptions) (storage.Attachment, error) {
	if err := d.at(ctx, "attach disk"); err != nil {
		return storage.Attachment{}, err
	}
	d.volumes.mu.Lock()
	defer d.volumes.mu.Unlock()
	if by, ok := d.volumes.holders[id]; ok && by != h {
		return storage.Attachment{}, &storage.HeldError{VolumeID: id, Holder: by}
	}
	if d.volumes.holders == nil {
		d.volumes.holders = map[string]storage.Holder{}
	}
	d.volumes.holders[id] = h
	d.volumes.order = append(d.volumes.order, "attach")
	return storage.Attachment{VolumeID: id, DiskID: storage.DiskID(id), Path: "/volumes/" + id, Format: storage.FormatRaw, Bytes: 1 << 30, ReadOnly: o.ReadOnly}, nil
}

func (d fakeDisks) Detach(ctx context.Context, id string, h storage.Holder) error {
	if err := d.at(ctx, "detach disk"); err != nil {
		return err
	}
	d.volumes.mu.Lock()
	defer d.volumes.mu.Unlock()
	if d.volumes.holders[id] == h {
		delete(d.volumes.holders, id)
		d.volumes.order = append(d.volumes.order, "detach")
	}
	return nil
}

// Format makes what serveFormat takes for a file system.
func (d fakeDisks) Format(ctx context.Context, fsType string, size int64, noise bool, write func(int64, int64, []byte) error) error {
	if err := d.at(ctx, "make file system"); err != nil {
		return err
	}
	return write(4096, 4, []byte(fsType))
}

func (g *fakeGuest) serveFormat(h *agentapi.StreamHeader, s *agentapi.Stream) error {
	s.Accept()
	b, err := io.ReadAll(s)
	if err != nil {
		return err
	}
	e, err := agentapi.ReadExtent(strings.NewReader(string(b)), make([]byte, agentapi.MaxExtent), 1<<30)
	if err == nil && (string(e.Data) != "ext4" || e.Offset != 4096) {
		err = fmt.Errorf("a file system of %q at %d", e.Data, e.Offset)
	}
	if err == nil {
		v := &g.host.volumes
		v.mu.Lock()
		if v.formats == nil {
			v.formats = map[string]int{}
		}
		v.formats[strings.TrimPrefix(h.Volume, "disk-")]++
		v.order = append(v.order, "format")
		v.mu.Unlock()
	}
	return s.Finish(err)
}

func (g *fakeGuest) RemoveVolume(ctx context.Context, r *agentapi.RemoveVolumeRequest) (*agentapi.RemoveVolumeResponse, error) {
	if err := g.host.at(ctx, "remove volume"); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for id, c := range g.containers {
		if slices.ContainsFunc(c.req.Mounts, func(m *agentapi.VolumeMount) bool { return m.Volume == r.Id }) {
			return nil, fmt.Errorf("volume %s is used by container %s: %w", r.Id, id, errdefs.ErrFailedPrecondition)
		}
	}
	if v := g.volumes[r.Id]; v != nil && v.Kind == agentapi.AddVolumeRequest_DISK {
		g.host.volumes.note("unmount")
	}
	delete(g.volumes, r.Id)
	return &agentapi.RemoveVolumeResponse{}, nil
}

func (g *fakeGuest) ExpandVolume(_ context.Context, r *agentapi.ExpandVolumeRequest) (*agentapi.ExpandVolumeResponse, error) {
	g.host.volumes.note(fmt.Sprintf("expand to %d", r.Bytes))
	return &agentapi.ExpandVolumeResponse{Bytes: r.Bytes}, nil
}

func (m *fakeMachine) ResizeDisk(ctx context.Context, id string, bytes int64) error {
	if !slices.ContainsFunc(m.Spec().Disks, func(d vmpod.Disk) bool { return d.ID == id }) {
		return fmt.Errorf("disk %s: %w", id, errdefs.ErrNotFound)
	}
	m.host.volumes.note(fmt.Sprintf("resize to %d", bytes))
	return nil
}
