package cri

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// A liveVolume is a volume that the guest has.
type liveVolume struct {
	pod *pod
	// sending serialises sends of one tree.
	sending sync.Mutex
	volume  volume // guarded by sending, but for ID, Kind, HostPath and File
}

// ensureVolumes makes the volumes of a plan that the guest has not got, and
// brings the trees it has up to date. The pod is locked.
func (p *pod) ensureVolumes(ctx context.Context, volumes []volume) error {
	for _, v := range volumes {
		if err := p.ensureVolume(ctx, v); err != nil {
			return fmt.Errorf("volume %s: %w", v.ID, err)
		}
	}
	return nil
}

func (p *pod) ensureVolume(ctx context.Context, v volume) error {
	p.mu.Lock()
	live := p.volumes[v.ID]
	p.mu.Unlock()
	if live != nil {
		if live.volume.Kind == agentapi.AddVolumeRequest_TREE {
			return live.send(ctx)
		}
		return nil
	}
	if v.Disk != nil {
		return p.ensureDisk(ctx, v)
	}
	req := &agentapi.AddVolumeRequest{Id: v.ID, Kind: v.Kind, SizeLimit: v.SizeLimit}
	if v.Share != nil {
		if err := p.plugShare(ctx, *v.Share); err != nil {
			return err
		}
		req.Share = v.Share.ID
	}
	if v.FSGroup != nil {
		req.HasFsGroup, req.FsGroup = true, *v.FSGroup
	}
	if _, err := call(ctx, p.link, agentapi.AgentService.AddVolume, req); err != nil {
		return err
	}
	failpoint.Hit(failpoint.CreateVolumeAdded)
	live = &liveVolume{pod: p, volume: v}
	if v.Follow { // first follow, then send: no change falls between
		if err := p.s.watch.add(live); err != nil {
			return err
		}
	}
	if v.Kind == agentapi.AddVolumeRequest_TREE {
		if err := live.send(ctx); err != nil {
			p.s.watch.drop(live)
			return err
		}
	}
	p.mu.Lock()
	p.volumes[v.ID] = live
	p.mu.Unlock()
	err := p.s.store.updateSandbox(p.id, noEvent, func(sb *sandbox) {
		sb.Volumes = slices.DeleteFunc(sb.Volumes, func(o volume) bool { return o.ID == v.ID })
		sb.Volumes = append(sb.Volumes, live.record())
	})
	failpoint.Hit(failpoint.CreateVolumeNoted)
	return err
}

func (l *liveVolume) record() volume {
	l.sending.Lock()
	defer l.sending.Unlock()
	return l.volume
}

// send brings the guest's copy of a tree up to date; an equal one is not sent
// again.
func (l *liveVolume) send(ctx context.Context) error {
	l.sending.Lock()
	defer l.sending.Unlock()
	tarball, hash, err := packTree(&l.volume)
	if err != nil {
		return err
	}
	if hash == l.volume.Hash {
		return nil
	}
	for try := 0; ; try++ {
		c, err := l.pod.link.session(ctx)
		if err != nil {
			return err
		}
		if err = c.PutTree(ctx, l.volume.ID, bytes.NewReader(tarball)); err == nil {
			break
		}
		if try > 0 || c.Err() == nil || ctx.Err() != nil {
			return err
		}
	}
	l.volume.Hash = hash
	return nil
}

// refresh follows a change on the host, trying again for a while: the agent
// may just be away.
func (l *liveVolume) refresh() {
	p := l.pod
	ctx, cancel := context.WithTimeout(p.ctx, time.Minute)
	defer cancel()
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		err := l.send(ctx)
		if err == nil {
			v := l.record()
			err := p.s.store.updateSandbox(p.id, noEvent, func(sb *sandbox) {
				if i := slices.IndexFunc(sb.Volumes, func(o volume) bool { return o.ID == v.ID }); i >= 0 {
					sb.Volumes[i].Hash = v.Hash
				}
			})
			if err != nil && !errdefs.IsNotFound(err) {
				p.log.Warn("recording a volume's state failed", "volume", v.ID, "err", err)
			}
			p.log.Debug("volume is up to date in the guest", "volume", v.ID)
			return
		}
		if p.ctx.Err() != nil {
			return
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			p.log.Error("a changed volume could not be sent to the guest; the next change or container tries again", "volume", l.volume.ID, "err", err)
			return
		}
	}
}

// VolumeUsage returns what a volume that lives in the guest takes there, for
// the kubelet's GetMetrics. hostDir is the directory that was in the CRI mount
// (a path below it will do too). ErrNotFound if no sandbox of the pod that is
// ready has such a volume yet.
func (s *Server) VolumeUsage(ctx context.Context, podUID, hostDir string) (storage.Usage, error) {
	for _, sb := range s.store.sandboxesOfPod(podUID) {
		if s.livePod(sb.ID) == nil {
			continue
		}
		volume := sb.volumeAt(hostDir)
		if volume == nil {
			continue
		}
		rd, err := s.read(ctx, sb, letSleep)
		if err != nil {
			return storage.Usage{}, err
		}
		for _, v := range rd.guest.GetVolumes() {
			if v.Id == volume.ID && v.Usage != nil {
				return storage.Usage{
					Time: rd.at, Path: filepath.Clean(hostDir),
					Bytes: v.Usage.UsedBytes, Inodes: v.Usage.UsedInodes,
					CapacityBytes: v.Usage.CapacityBytes, AvailableBytes: v.Usage.AvailableBytes,
					InodesCapacity: v.Usage.Inodes, InodesFree: v.Usage.InodesFree,
				}, nil
			}
		}
	}
	return storage.Usage{}, fmt.Errorf("volume %s of pod %s is in no running guest: %w", hostDir, podUID, errdefs.ErrNotFound)
}
