package volumes

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/volume/util/subpath"
)

func TestSubpath(t *testing.T) {
	for path, want := range map[string]string{"/v/a/b": "/v/a/b", "/v/a": "/v/a", "/v": "/v", "/v/../etc": "", "/w": ""} {
		got, cleanup, err := NewSubpather(t.Context(), nil, 0, nil).PrepareSafeSubpath(subpath.Subpath{VolumePath: "/v", Path: path})
		if got != want || (err == nil) != (want != "") || cleanup != nil {
			t.Errorf("PrepareSafeSubpath(%s) = %q, %v", path, got, err)
		}
	}
}

// heard is a SubPathTeller that writes down what it is told.
type heard []string

func (h *heard) Failed(s SubPath, err error) { *h = append(*h, fmt.Sprint("failed ", s, " ", err)) }
func (h *heard) Prepared(s SubPath)          { *h = append(*h, fmt.Sprint("prepared ", s)) }
func (h *heard) Gone(uid types.UID, volume string) {
	*h = append(*h, fmt.Sprint("gone ", uid, " ", volume))
}

// TestSubpathAsksTheGuest: what the guest has against a sub-path is the
// kubelet's error, so that the container waits with CreateContainerConfigError.
func TestSubpathAsksTheGuest(t *testing.T) {
	var h heard
	var asked []string
	var fail error
	ctx, cancel := context.WithCancel(t.Context())
	p := NewSubpather(ctx, func(ctx context.Context, podUID, path string) error {
		if _, bounded := ctx.Deadline(); !bounded {
			t.Error("asked without a bound")
		}
		asked = append(asked, podUID+" "+path)
		return fail
	}, time.Minute, &h)
	s := subpath.Subpath{VolumeMountIndex: 2, Path: "/k/pods/uid/volumes/e/v/a/b", VolumeName: "v", VolumePath: "/k/pods/uid/volumes/e/v", PodDir: "/k/pods/uid", ContainerName: "c"}
	if err := p.SafeMakeDir("a/b", s.VolumePath, 0o777); err != nil || asked != nil {
		t.Errorf("SafeMakeDir: %v, asked %q", err, asked)
	}
	if token, _, err := p.PrepareSafeSubpath(s); err != nil || token != s.Path {
		t.Errorf("got %q, %v", token, err)
	}
	fail = errors.New("it leads out")
	if token, _, err := p.PrepareSafeSubpath(s); !errors.Is(err, fail) || token != "" {
		t.Errorf("got %q, %v", token, err)
	}
	if err := p.CleanSubPaths(s.PodDir, "v"); err != nil {
		t.Error(err)
	}
	cancel() // the node shuts down
	if _, _, err := p.PrepareSafeSubpath(s); err == nil {
		t.Error("no error")
	}
	if want := "uid " + s.Path; !slices.Equal(asked, []string{want, want, want}) {
		t.Errorf("asked %q", asked)
	}
	if !slices.Equal(h, heard{"prepared {uid c 2 v a/b}", "failed {uid c 2 v a/b} it leads out", "gone uid v"}) {
		t.Errorf("told %q", h)
	}
}
