package crashmatrix

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	csi "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A pod has two volumes: the one that every round's pod has, and whose content
// grows, and one of its own, which is blank.

const (
	keptVolume = "kept"
	volumeSize = 32 << 20
	grownSize  = 48 << 20
)

// A csiVolume is one that the test has asked for.
type csiVolume struct {
	name, id string
	target   string // where it is published, "" if it is not
}

var oneWriter = &csi.VolumeCapability{
	AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
	AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: "ext4"}},
}

func (n *node) createVolume(ctx context.Context, v *csiVolume) error {
	n.passing[v.name] = true
	resp, err := csi.NewControllerClient(n.csi).CreateVolume(ctx, &csi.CreateVolumeRequest{
		Name: v.name, CapacityRange: &csi.CapacityRange{RequiredBytes: volumeSize},
		VolumeCapabilities: []*csi.VolumeCapability{oneWriter}, Parameters: map[string]string{"policy": "atoll-local"},
	})
	if err != nil {
		return err
	}
	delete(n.passing, v.name)
	v.id = resp.GetVolume().GetVolumeId()
	n.volumes[v.name] = v
	return nil
}

func (n *node) deleteVolume(ctx context.Context, v *csiVolume) error {
	n.passing[v.name] = true
	delete(n.volumes, v.name)
	_, err := csi.NewControllerClient(n.csi).DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id})
	if err == nil {
		delete(n.passing, v.name)
	}
	return err
}

// publish does the kubelet's part, and returns the container's mount.
func (n *node) publish(ctx context.Context, p *pod, v *csiVolume) (*runtimeapi.Mount, error) {
	v.target = filepath.Join(n.kubelet(), "pods", p.uid(), "volumes/kubernetes.io~csi", v.name, "mount")
	if err := os.MkdirAll(filepath.Dir(v.target), 0o755); err != nil {
		return nil, err
	}
	_, err := csi.NewNodeClient(n.csi).NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: v.id, TargetPath: v.target, VolumeCapability: oneWriter})
	return &runtimeapi.Mount{ContainerPath: "/" + v.name, HostPath: v.target}, err
}

func (n *node) unpublish(ctx context.Context, v *csiVolume) error {
	_, err := csi.NewNodeClient(n.csi).NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target})
	return err
}

// expandVolume grows the volume, its disk and the file system on it.
func (n *node) expandVolume(ctx context.Context, v *csiVolume) error {
	room := &csi.CapacityRange{RequiredBytes: grownSize}
	if _, err := csi.NewControllerClient(n.csi).ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: v.id, CapacityRange: room, VolumeCapability: oneWriter}); err != nil {
		return err
	}
	_, err := csi.NewNodeClient(n.csi).NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: v.target, CapacityRange: room, VolumeCapability: oneWriter})
	return err
}

// volumeScript tells of values that are lost, or a volume that was formatted
// again, and adds a value to the one that is kept.
func (r *round) volumeScript() string {
	return fmt.Sprintf(`[ $(cat /kept/rounds 2> /dev/null | wc -l) -ge %d ] || echo lost; [ -d /%s/lost+found ] || echo unformatted; echo round | dd of=/kept/rounds oflag=append conv=notrunc,fsync 2> /dev/null; `, r.node.keptRounds, r.fresh.name)
}

// createsVolumes makes the pod's volumes.
func (r *round) createsVolumes() error {
	if r.node.volumes[keptVolume] == nil {
		if err := r.once(createVolume, func(ctx context.Context) error { return r.node.createVolume(ctx, &csiVolume{name: keptVolume}) }); err != nil {
			return err
		}
	}
	r.fresh = &csiVolume{name: fmt.Sprintf("fresh-%d", r.number)}
	return r.do(createVolume, func(ctx context.Context) error { return r.node.createVolume(ctx, r.fresh) })
}

// publishes gives the volumes to the main container.
func (r *round) publishes() error {
	return r.once("NodePublishVolume", func(ctx context.Context) error {
		for _, v := range []*csiVolume{r.node.volumes[keptVolume], r.fresh} {
			m, err := r.node.publish(ctx, r.pod, v)
			if err != nil {
				return err
			}
			r.main.Mounts = append(r.main.Mounts, m)
		}
		return nil
	})
}

// expandsVolume grows the volume while the container has it.
func (r *round) expandsVolume() error {
	if err := r.do(expandVolume, func(ctx context.Context) error { return r.node.expandVolume(ctx, r.fresh) }); err != nil {
		return err
	}
	return r.once(expandVolume, func(ctx context.Context) error {
		resp, err := csi.NewNodeClient(r.node.csi).NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{VolumeId: r.fresh.id, VolumePath: r.fresh.target})
		if err != nil {
			return err
		}
		for _, u := range resp.Usage {
			if u.Unit == csi.VolumeUsage_BYTES && u.Total < volumeSize {
				return fmt.Errorf("the file system of a volume of %d bytes has %d", grownSize, u.Total)
			}
		}
		return nil
	})
}

// deletesVolume takes the volumes from the pod, which is gone, and deletes its
// own.
func (r *round) deletesVolume() error {
	err := r.once("NodeUnpublishVolume", func(ctx context.Context) error {
		return errors.Join(r.node.unpublish(ctx, r.node.volumes[keptVolume]), r.node.unpublish(ctx, r.fresh))
	})
	if err != nil {
		return err
	}
	return r.do(deleteVolume, func(ctx context.Context) error { return r.node.deleteVolume(ctx, r.fresh) })
}

// clearVolumes takes what a failed round has of volumes.
func (r *round) clearVolumes(ctx context.Context) {
	for _, v := range []*csiVolume{r.node.volumes[keptVolume], r.fresh} {
		if v != nil && v.target != "" {
			_ = r.node.unpublish(ctx, v)
		}
	}
	if r.fresh != nil && r.fresh.id != "" {
		_ = r.node.deleteVolume(ctx, r.fresh)
	}
}

// deleteKept deletes the volume that every pod had, and looks how often volumes
// were formatted.
func (n *node) deleteKept(t *testing.T) error {
	v := n.volumes[keptVolume]
	if v == nil {
		return errors.New("no pod has had a volume")
	}
	twice, err := n.formattedTwice()
	if err != nil || len(twice) > 0 {
		t.Errorf("formatted more than once: %q, %v", twice, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), rpcTimeout)
	defer cancel()
	err = n.deleteVolume(ctx, v)
	if status.Code(err) == codes.FailedPrecondition {
		err = fmt.Errorf("a volume that no pod has is held: %w", err)
	}
	return err
}

// volumeName is what a volume's ID, its record and its file have in common.
var volumeName = regexp.MustCompile(`^(?:[0-9a-f]+\.)?(v-[0-9a-f]+)(-[0-9a-f]+\.raw|\.json)?$`)

// volumeOf names the volume of an ID or a file; what is of none is itself.
func volumeOf(s string) string {
	if m := volumeName.FindStringSubmatch(s); m != nil {
		return m[1]
	}
	return s
}

// datastore looks at the volumes' records, files and leases.
func (c *census) datastore() error {
	var all []string
	for _, v := range c.node.volumes {
		all = append(all, volumeOf(v.id))
	}
	wanted := func(id string) bool { return slices.Contains(all, id) }
	more := 0
	allowed := func(id string) bool {
		if !wanted(id) {
			more++
		}
		return wanted(id) || more <= 2*len(c.passing) // its record and its file
	}
	for what, dir := range map[string]string{"record of volume": "volumes", "file of volume": "disks"} {
		files, err := names(filepath.Join(c.data, "volumes", dir))
		if err != nil {
			return err
		}
		var there []string
		for _, f := range files {
			there = append(there, volumeOf(f))
		}
		c.compare(what, there, allowed, wanted, all)
	}
	return c.leases()
}

// leases: who has no VM holds no volume, and what a QEMU has open is held for
// it.
func (c *census) leases() error {
	files, err := filepath.Glob(filepath.Join(c.data, "volumes/leases/*"))
	if err != nil {
		return err
	}
	holders := map[string]string{}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		var l struct {
			Volume string
			Holder struct{ VM string }
		}
		if err := json.Unmarshal(b, &l); err != nil || l.Volume == "" {
			c.note("lease %s: %v", file, err)
			continue
		}
		holders[volumeOf(l.Volume)] = l.Holder.VM
		if !c.networked(l.Holder.VM) {
			c.note("volume %s is held by %s, which no record knows", l.Volume, l.Holder.VM)
		}
	}
	qs, err := c.qemus()
	if err != nil {
		return err
	}
	for key, pids := range qs {
		for _, name := range openVolumes(pids, filepath.Join(c.data, "volumes/disks")) {
			if holders[name] != key {
				c.note("volume %s is open in %s, and held by %q", name, key, holders[name])
			}
		}
	}
	return nil
}

// openVolumes are the volumes whose files processes have open.
func openVolumes(pids []int, dir string) (open []string) {
	for _, pid := range pids {
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		for _, fd := range fds {
			file, err := os.Readlink(fd)
			if name := volumeOf(filepath.Base(file)); err == nil && filepath.Dir(file) == dir && !slices.Contains(open, name) {
				open = append(open, name)
			}
		}
	}
	return open
}

// formattedTwice are the volumes that daemons have formatted more than once.
func (n *node) formattedTwice() (ids []string, err error) {
	b, err := os.ReadFile(n.log.Name())
	if err != nil {
		return nil, err
	}
	times := map[string]int{}
	for line := range bytes.Lines(b) {
		if _, rest, ok := strings.Cut(string(line), "a blank volume has a file system now"); ok {
			if m := regexp.MustCompile(`volume=(\S+)`).FindStringSubmatch(rest); m != nil {
				if times[m[1]]++; times[m[1]] == 2 {
					ids = append(ids, m[1])
				}
			}
		}
	}
	if len(times) == 0 {
		return nil, errors.New("no log line tells of a volume that was formatted")
	}
	return ids, nil
}
