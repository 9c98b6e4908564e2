package podinit

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// TestSubPathError: each refusal has a class that crosses the channel, names
// the sub-path and says what to do.
func TestSubPathError(t *testing.T) {
	for errno, want := range map[unix.Errno]struct {
		class error
		cure  string
	}{
		unix.EXDEV:        {errdefs.ErrInvalidArgument, "put a directory in place of the link"},
		unix.ELOOP:        {errdefs.ErrInvalidArgument, "remove them"},
		unix.ENOTDIR:      {errdefs.ErrInvalidArgument, "remove that"},
		unix.ENAMETOOLONG: {errdefs.ErrInvalidArgument, "shorter"},
		unix.ENOENT:       {errdefs.ErrFailedPrecondition, "make that"},
		unix.EROFS:        {errdefs.ErrFailedPrecondition, "make it from a pod"},
		unix.ENOSPC:       {errdefs.ErrResourceExhausted, "make it larger"},
		unix.EDQUOT:       {errdefs.ErrResourceExhausted, "make it larger"},
	} {
		err := subPathError("a/b", fmt.Errorf("wrapped: %w", errno))
		if !errors.Is(err, want.class) || !strings.Contains(err.Error(), `"a/b"`) || !strings.Contains(err.Error(), want.cure) {
			t.Errorf("%v: %v", errno, err)
		}
	}
	if err := subPathError("a/b", unix.EIO); !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), `"a/b"`) {
		t.Error(err)
	}
}
