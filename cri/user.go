package cri

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/erofs/go-erofs"
	"github.com/moby/sys/user"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/storage"
)

// maxUserFile bounds what is read of an image's passwd and group files;
// containerd's bound.
const maxUserFile = 10 << 20

// resolveUser decides whom a container runs as: the security context's user,
// else the image's; names are looked up in the image's own files, on the
// host, under a size cap.
func resolveUser(root fs.FS, imageUser string, sc *runtimeapi.LinuxContainerSecurityContext) (specs.User, error) {
	spec := imageUser
	switch {
	case sc.GetRunAsUser() != nil:
		spec = strconv.FormatInt(sc.RunAsUser.Value, 10)
	case sc.GetRunAsUsername() != "":
		spec = sc.RunAsUsername
	case sc.GetRunAsGroup() != nil && spec == "":
		return specs.User{}, refuse("security_context.run_as_group", "it needs run_as_user, or an image that names a user")
	}
	if sc.GetRunAsGroup() != nil {
		name, _, _ := strings.Cut(spec, ":")
		spec = name + ":" + strconv.FormatInt(sc.RunAsGroup.Value, 10)
	}
	passwd, err := userFile(root, "etc/passwd")
	if err != nil {
		return specs.User{}, err
	}
	group, err := userFile(root, "etc/group")
	if err != nil {
		return specs.User{}, err
	}
	u, err := user.GetExecUser(spec, &user.ExecUser{}, strings.NewReader(passwd), strings.NewReader(group))
	if err != nil {
		return specs.User{}, fmt.Errorf("user %q of the image or the pod: %w: use a numeric runAsUser: %w", spec, err, errdefs.ErrInvalidArgument)
	}
	out := specs.User{UID: uint32(u.Uid), GID: uint32(u.Gid)}
	// The primary group is always among the supplementary ones: a process
	// that could shed it could pass by files that are closed to the group.
	gids := []uint32{out.GID}
	if sc.GetSupplementalGroupsPolicy() != runtimeapi.SupplementalGroupsPolicy_Strict {
		more, err := memberOf(passwd, group, u.Uid)
		if err != nil {
			return specs.User{}, err
		}
		gids = append(gids, more...)
	}
	for _, g := range sc.GetSupplementalGroups() {
		if g < 0 || g > 1<<32-2 {
			return specs.User{}, refuse("security_context.supplemental_groups", fmt.Sprintf("%d is not an id", g))
		}
		gids = append(gids, uint32(g))
	}
	slices.Sort(gids)
	out.AdditionalGids = slices.Compact(gids)
	return out, nil
}

// memberOf returns the groups that list the user by name, as a login does.
func memberOf(passwd, group string, uid int) ([]uint32, error) {
	users, err := user.ParsePasswdFilter(strings.NewReader(passwd), func(u user.User) bool { return u.Uid == uid })
	if err != nil || len(users) == 0 {
		return nil, err
	}
	groups, err := user.ParseGroupFilter(strings.NewReader(group), func(g user.Group) bool { return slices.Contains(g.List, users[0].Name) })
	if err != nil {
		return nil, err
	}
	var out []uint32
	for _, g := range groups {
		if g.Gid >= 0 && int64(g.Gid) <= 1<<32-2 {
			out = append(out, uint32(g.Gid))
		}
	}
	return out, nil
}

// userFile reads a file of the image; one that is not there is empty.
func userFile(root fs.FS, name string) (string, error) {
	if root == nil {
		return "", nil
	}
	f, err := root.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("/%s of the image: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err != nil {
		return "", fmt.Errorf("/%s of the image: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxUserFile+1))
	if err != nil {
		return "", fmt.Errorf("/%s of the image: %w", name, err)
	}
	if len(b) > maxUserFile {
		return "", refuse("image", fmt.Sprintf("its /%s has more than %d bytes", name, maxUserFile))
	}
	return string(b), nil
}

// A treeOpener is a storage.Images that can show an image's files on the
// host; without it, the disk itself is read.
type treeOpener interface {
	OpenTree(imageID string) (fs.FS, io.Closer, error)
}

// openTree shows the files of an image, for /etc/passwd and /etc/group. A nil
// tree means that only numeric ids can be used.
func (s *Server) openTree(imageID string, d storage.ImageDisk) (fs.FS, io.Closer, error) {
	if o, ok := s.config.Images.(treeOpener); ok {
		return o.OpenTree(imageID)
	}
	if d.FSType != "erofs" || d.Format == "vmdk" {
		return nil, io.NopCloser(nil), nil
	}
	f, err := os.Open(d.Path)
	if err != nil {
		return nil, nil, err
	}
	tree, err := erofs.Open(f)
	if err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("image disk %s: %w: %w", d.Path, err, errdefs.ErrDataLoss)
	}
	return tree, f, nil
}
