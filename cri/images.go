package cri

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
)

// PullImage fetches an image. Credentials are passed on and never logged; they
// are shown to the registry each time, also for an image that is here. A caller
// that leaves ends the download unless another waits for it. The CRI has no way
// to tell of progress: the log does.
func (r *imageService) PullImage(ctx context.Context, req *runtimeapi.PullImageRequest) (*runtimeapi.PullImageResponse, error) {
	ref := req.GetImage().GetImage()
	if ref == "" {
		return nil, refuse("image", "it is empty")
	}
	auth, err := authOf(req.GetAuth())
	if err != nil {
		return nil, err
	}
	start := time.Now()
	pod := req.GetSandboxConfig().GetMetadata()
	defer r.clockOf(vmpod.ID{PodUID: pod.GetUid(), Attempt: pod.GetAttempt()}).step(vmpod.PhaseImage, "pull")()
	progress := r.reportPull(ref, pullReportInterval)
	img, err := r.config.Images.Pull(ctx, ref, auth, progress.set)
	progress.end()
	if err != nil {
		return nil, err
	}
	r.log.Info("image is pulled", "image", ref, "id", img.ID, "took", time.Since(start))
	// The same as Image.id, whichever registry it came from (cri-api, v1.36).
	return &runtimeapi.PullImageResponse{ImageRef: img.ID}, nil
}

func authOf(a *runtimeapi.AuthConfig) (*storage.Auth, error) {
	if a == nil {
		return nil, nil
	}
	out := &storage.Auth{Username: a.Username, Password: a.Password, IdentityToken: a.IdentityToken, RegistryToken: a.RegistryToken}
	if a.Username == "" && a.IdentityToken == "" && a.RegistryToken == "" && a.Auth != "" {
		b, err := base64.StdEncoding.DecodeString(a.Auth)
		user, password, ok := strings.Cut(string(b), ":")
		if err != nil || !ok {
			return nil, refuse("auth.auth", "it is not base64 of user:password")
		}
		out.Username, out.Password = user, strings.TrimRight(password, "\x00")
	}
	if *out == (storage.Auth{}) {
		return nil, nil
	}
	return out, nil
}

// ImageStatus reports an image; none is no error.
func (r *imageService) ImageStatus(ctx context.Context, req *runtimeapi.ImageStatusRequest) (*runtimeapi.ImageStatusResponse, error) {
	img, err := r.config.Images.Get(ctx, req.GetImage().GetImage())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.ImageStatusResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.ImageStatusResponse{Image: criImage(img)}
	if req.GetVerbose() {
		info, err := json.Marshal(struct {
			ImageSpec any `json:"imageSpec"`
		}{img.Config})
		if err != nil {
			return nil, err
		}
		resp.Info = map[string]string{"info": string(info)}
	}
	return resp, nil
}

// ListImages lists the images on the host.
func (r *imageService) ListImages(ctx context.Context, req *runtimeapi.ListImagesRequest) (*runtimeapi.ListImagesResponse, error) {
	images, err := r.listImages(ctx, req.GetFilter())
	return &runtimeapi.ListImagesResponse{Images: images}, err
}

// StreamImages is ListImages in parts.
func (r *imageService) StreamImages(req *runtimeapi.StreamImagesRequest, stream runtimeapi.ImageService_StreamImagesServer) error {
	images, err := r.listImages(stream.Context(), req.GetFilter())
	if err != nil {
		return err
	}
	return inParts(images, func(items []*runtimeapi.Image) error {
		return stream.Send(&runtimeapi.StreamImagesResponse{Images: items})
	})
}

func (s *Server) listImages(ctx context.Context, f *runtimeapi.ImageFilter) ([]*runtimeapi.Image, error) {
	if ref := f.GetImage().GetImage(); ref != "" {
		img, err := s.config.Images.Get(ctx, ref)
		if errdefs.IsNotFound(err) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		return []*runtimeapi.Image{criImage(img)}, nil
	}
	all, err := s.config.Images.List(ctx)
	if err != nil {
		return nil, err
	}
	var out []*runtimeapi.Image
	for _, img := range all {
		out = append(out, criImage(img))
	}
	return out, nil
}

func criImage(img storage.Image) *runtimeapi.Image {
	out := &runtimeapi.Image{
		Id: img.ID, RepoTags: img.Tags, RepoDigests: img.Digests, Size: uint64(max(img.Size, 0)), Pinned: img.Pinned,
		Spec: &runtimeapi.ImageSpec{Image: img.ID},
	}
	name, _, _ := strings.Cut(img.Config.Config.User, ":")
	if name == "" {
		return out
	}
	if uid, err := strconv.ParseInt(name, 10, 64); err == nil {
		out.Uid = &runtimeapi.Int64Value{Value: uid}
	} else {
		out.Username = name
	}
	return out
}

// RemoveImage forgets an image; one that is gone is no error.
func (r *imageService) RemoveImage(ctx context.Context, req *runtimeapi.RemoveImageRequest) (*runtimeapi.RemoveImageResponse, error) {
	ref := req.GetImage().GetImage()
	if ref == "" {
		return nil, refuse("image", "it is empty")
	}
	if err := r.config.Images.Remove(ctx, ref); err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	r.log.Info("image is removed", "image", ref)
	return &runtimeapi.RemoveImageResponse{}, nil
}

// ImageFsInfo reports what images, and what the pods' writable disks, take.
func (r *imageService) ImageFsInfo(ctx context.Context, _ *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	images, err := r.config.Images.Usage(ctx)
	if err != nil {
		return nil, err
	}
	disks, err := r.ephemeralUsage(ctx, images.Path)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ImageFsInfoResponse{
		ImageFilesystems:     []*runtimeapi.FilesystemUsage{fsUsage(images)},
		ContainerFilesystems: []*runtimeapi.FilesystemUsage{fsUsage(disks)},
	}, nil
}

// ephemeralUsage sums the pods' writable disks. They are named by the images'
// directory when both lie on one file system, as the kubelet compares names.
func (s *Server) ephemeralUsage(ctx context.Context, imagePath string) (storage.Usage, error) {
	sum := storage.Usage{Time: time.Now(), Path: imagePath}
	keys, err := s.config.Ephemeral.List(ctx)
	if err != nil {
		return sum, fmt.Errorf("list the ephemeral disks: %w", err)
	}
	for _, key := range keys {
		u, err := s.config.Ephemeral.Usage(ctx, key)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return sum, err
		}
		sum.Bytes += u.Bytes
		sum.Inodes += max(u.Inodes, 1)
		if dir := directoryOf(u.Path); dir != "" && !sameFilesystem(dir, imagePath) {
			sum.Path = dir
		}
	}
	return sum, nil
}

func directoryOf(path string) string {
	if fi, err := os.Stat(path); err == nil && !fi.IsDir() {
		return filepath.Dir(path)
	}
	return path
}

func fsUsage(u storage.Usage) *runtimeapi.FilesystemUsage {
	at := u.Time
	if at.IsZero() {
		at = time.Now()
	}
	return &runtimeapi.FilesystemUsage{
		Timestamp:  at.UnixNano(),
		FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: u.Path},
		UsedBytes:  &runtimeapi.UInt64Value{Value: u.Bytes},
		InodesUsed: &runtimeapi.UInt64Value{Value: u.Inodes},
	}
}
