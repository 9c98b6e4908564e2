// Package storage defines what pods keep data on: container images turned
// into read-only disks, the pod's own ephemeral disk, and volumes (Disks).
// storage/image, storage/local and storage/vmdk implement it; every disk is one
// that a vmpod.Driver can show to a guest.
package storage

import (
	"context"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Images is a host's store of container images. Errors wrap errdefs classes:
// ErrNotFound for an image or reference that does not exist, ErrInvalidArgument
// for a malformed reference, ErrPermissionDenied for refused credentials,
// ErrUnavailable for a registry that does not answer, ErrDataLoss for content
// that is not what its digest says, ErrResourceExhausted for a full disk. The
// message always names the reference and the cure.
type Images interface {
	// Pull fetches and converts an image; it joins a pull of the same
	// reference that is under way. Progress may be nil.
	Pull(ctx context.Context, ref string, auth *Auth, progress func(Progress)) (Image, error)
	// Get finds an image by ID, by digest reference or by tag.
	Get(ctx context.Context, ref string) (Image, error)
	List(ctx context.Context) ([]Image, error)
	// Remove forgets the references of the image ref names, and its content
	// once no disk of it is in use. Removing what is gone succeeds.
	Remove(ctx context.Context, ref string) error
	// Disk returns the read-only disk of an image, converting it if need be.
	// The disk is kept while user holds it (until Release).
	Disk(ctx context.Context, imageID, user string) (ImageDisk, error)
	// Release ends user's hold on every image disk.
	Release(ctx context.Context, user string) error
	// Usage is what images take on the host's disk.
	Usage(ctx context.Context) (Usage, error)
}

// Auth is what a registry wants to see; only one form is used, in CRI's order.
type Auth struct {
	Username, Password, IdentityToken, RegistryToken string
}

// Progress of one pull, for people to look at.
type Progress struct {
	Stage        string // resolving, fetching, converting, done
	Bytes, Total int64
}

// An Image is what is known of one image.
type Image struct {
	// ID is the digest of the image's config, as "sha256:…".
	ID string
	// Tags and Digests are full references ("registry/name:tag",
	// "registry/name@sha256:…").
	Tags, Digests []string
	// Size in bytes on the host: compressed layers and disk.
	Size   int64
	Config ocispec.Image
	Pinned bool
}

// An ImageDisk is an image as a block device.
type ImageDisk struct {
	// ID is a name for the guest: at most 20 characters of [a-z0-9-].
	ID     string
	Path   string
	Format string // raw or vmdk
	FSType string // erofs
	Bytes  int64
}

// Ephemeral is the writable disk of each pod: an ext4 file system, sparse,
// labelled so that the guest finds it, erased with the pod.
type Ephemeral interface {
	// Create makes the disk for key (a sandbox), or returns the one there.
	Create(ctx context.Context, key string, bytes int64) (path string, err error)
	// Remove erases it; removing what is gone succeeds.
	Remove(ctx context.Context, key string) error
	// List returns the keys of all disks on the host.
	List(ctx context.Context) ([]string, error)
	// Usage is what the disk of key takes on the host.
	Usage(ctx context.Context, key string) (Usage, error)
}

// Usage of a file system or a part of it.
type Usage struct {
	Time           time.Time
	Path           string
	Bytes, Inodes  uint64
	CapacityBytes  uint64
	AvailableBytes uint64
	// InodesCapacity and InodesFree are 0 where they are not known.
	InodesCapacity uint64
	InodesFree     uint64
}
