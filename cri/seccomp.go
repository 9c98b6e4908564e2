package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxProfile bounds a seccomp profile's size; Docker's default has 20 KiB.
const maxProfile = 1 << 20

// A seccompChoice is which system calls a container may make.
type seccompChoice struct {
	runtimeDefault bool
	profile        *specs.LinuxSeccomp // of Localhost
}

// chooseSeccomp reads the container's choice; unset means unconfined, as the
// kubelet says what it wants. features is what the guest kernel can do.
func chooseSeccomp(sc *runtimeapi.LinuxContainerSecurityContext, kubeletRoot string, features []string) (*seccompChoice, error) {
	p := sc.GetSeccomp()
	if p == nil {
		var err error
		if p, err = oldSeccomp(sc.GetSeccompProfilePath()); err != nil {
			return nil, err
		}
	}
	if p == nil || p.ProfileType == runtimeapi.SecurityProfile_Unconfined || sc.GetPrivileged() {
		return &seccompChoice{}, nil
	}
	if len(features) > 0 && !slices.Contains(features, "seccomp") {
		return nil, refuse("security_context.seccomp", "the guest kernel has no seccomp: use a kernel with CONFIG_SECCOMP_FILTER, or Unconfined")
	}
	if p.ProfileType == runtimeapi.SecurityProfile_RuntimeDefault {
		return &seccompChoice{runtimeDefault: true}, nil
	}
	profile, err := readProfile(p.LocalhostRef, kubeletRoot)
	return &seccompChoice{profile: profile}, err
}

// oldSeccomp reads the deprecated field.
func oldSeccomp(path string) (*runtimeapi.SecurityProfile, error) {
	switch {
	case path == "":
		return nil, nil
	case path == "unconfined":
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}, nil
	case path == "runtime/default" || path == "docker/default":
		return &runtimeapi.SecurityProfile{}, nil
	case strings.HasPrefix(path, "localhost/"):
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: strings.TrimPrefix(path, "localhost/")}, nil
	}
	return nil, refuse("security_context.seccomp_profile_path", fmt.Sprintf("%q is not known: use the seccomp field", path))
}

// readProfile reads a profile of this host, to be sent inline. A kubelet's
// lie in its seccomp directory, and nowhere else.
func readProfile(ref, kubeletRoot string) (*specs.LinuxSeccomp, error) {
	ref = strings.TrimPrefix(ref, "localhost/")
	if !filepath.IsAbs(ref) && kubeletRoot != "" {
		ref = filepath.Join(kubeletRoot, "seccomp", ref)
	}
	f, err := openProfile(ref, kubeletRoot)
	if err != nil {
		return nil, fmt.Errorf("seccomp profile %s: %w: put it on the node: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxProfile+1))
	if err != nil {
		return nil, fmt.Errorf("seccomp profile %s: %w", ref, err)
	}
	if len(b) > maxProfile {
		return nil, refuse("security_context.seccomp", fmt.Sprintf("profile %s has more than %d bytes", ref, maxProfile))
	}
	var p specs.LinuxSeccomp
	if err := json.Unmarshal(b, &p); err != nil {
		return nil, fmt.Errorf("seccomp profile %s: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	return &p, nil
}

func openProfile(path, kubeletRoot string) (*os.File, error) {
	if kubeletRoot != "" {
		dir := filepath.Join(kubeletRoot, "seccomp")
		if rel, ok := below(dir, path); ok {
			root, err := os.OpenRoot(dir)
			if err != nil {
				return nil, err
			}
			defer root.Close()
			return root.Open(rel)
		}
	}
	// A named pipe must not hold the caller up.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// opts must come after the capabilities: the default profile depends on them.
func (c *seccompChoice) opts() []oci.SpecOpts {
	switch {
	case c == nil:
		return nil
	case c.runtimeDefault:
		return []oci.SpecOpts{seccomp.WithDefaultProfile()}
	case c.profile != nil:
		return []oci.SpecOpts{func(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error {
			s.Linux.Seccomp = c.profile
			return nil
		}}
	}
	return nil
}
