package image

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
)

// A ref is a reference as people write it, made full: busybox becomes
// docker.io/library/busybox:latest.
type ref struct {
	named  reference.Named // without tag and digest
	tag    string          // empty beside a digest
	digest digest.Digest
}

// parseRef understands what docker pull does. A name with tag and digest is
// the digest; the tag says nothing then.
func parseRef(s string) (ref, error) {
	named, err := reference.ParseDockerRef(s)
	if err != nil {
		return ref{}, fmt.Errorf("%.300q is no reference of an image (%w): want registry/name:tag or registry/name@sha256:…, in lower case: %w",
			s, err, errdefs.ErrInvalidArgument)
	}
	r := ref{named: reference.TrimNamed(named)}
	switch v := named.(type) {
	case reference.Digested:
		r.digest = v.Digest()
	case reference.Tagged:
		r.tag = v.Tag()
	}
	return r, nil
}

// host is the registry's name, with its port if there is one.
func (r ref) host() string { return reference.Domain(r.named) }

func (r ref) String() string {
	if r.digest != "" {
		return r.withDigest(r.digest)
	}
	return r.named.Name() + ":" + r.tag
}

func (r ref) withDigest(d digest.Digest) string { return r.named.Name() + "@" + d.String() }

var idPattern = regexp.MustCompile(`^(sha256:)?[0-9a-f]{3,64}$`)

// matchID finds the one ID that prefix starts, or none. It returns
// ErrInvalidArgument for a prefix of several.
func matchID(ids []string, prefix string) (string, error) {
	if !idPattern.MatchString(prefix) {
		return "", nil
	}
	prefix = "sha256:" + strings.TrimPrefix(prefix, "sha256:")
	var found string
	for _, id := range slices.Compact(slices.Sorted(slices.Values(ids))) {
		if !strings.HasPrefix(id, prefix) {
			continue
		}
		if found != "" {
			return "", fmt.Errorf("image ID %s is ambiguous: give more of its digits: %w", prefix, errdefs.ErrInvalidArgument)
		}
		found = id
	}
	return found, nil
}
