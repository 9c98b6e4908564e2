package cri

import (
	"context"
	"fmt"
	"path/filepath"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// plugImageVolumes makes mounts of the plan's images: an image as a volume is
// one more disk of the machine, always read-only. It can be executed from, as
// with other runtimes: KEP-4639 has dropped noexec. Errors begin with the words
// by which the kubelet knows them.
func (p *pod) plugImageVolumes(ctx context.Context, plan *mountPlan) error {
	for _, m := range plan.images {
		img, err := p.s.config.Images.Get(ctx, m.Image.Image)
		if err != nil {
			return fmt.Errorf("%w: mount at %s: %w", crierrors.ErrImageVolumeMountFailed, m.ContainerPath, err)
		}
		disk, err := p.plugImage(ctx, img)
		if err != nil {
			return fmt.Errorf("%w: mount of %s at %s: %w", crierrors.ErrImageVolumeMountFailed, m.Image.Image, m.ContainerPath, err)
		}
		plan.mounts = append(plan.mounts, &agentapi.VolumeMount{
			ImageDisk: disk.ID, SubPath: m.ImageSubPath, Destination: filepath.Clean(m.ContainerPath),
			ReadOnly: true, Propagation: propagation(m.Propagation),
		})
		plan.reported = append(plan.reported, &runtimeapi.Mount{
			ContainerPath: m.ContainerPath, Image: m.Image, ImageSubPath: m.ImageSubPath,
			Readonly: true, RecursiveReadOnly: m.RecursiveReadOnly, Propagation: m.Propagation,
		})
	}
	return nil
}
