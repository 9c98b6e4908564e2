package csi

import (
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/openatoll/atoll/storage"
)

// Who could make a copy is told beside the code and the sentence, and nothing else
// is taken for it.
func TestHeldBy(t *testing.T) {
	held := &storage.HeldElsewhereError{Holder: storage.Holder{VM: "vm", Host: "n2"}, Datastore: "nfs"}
	err := toGRPC(fmt.Errorf("snapshot s: %w", held))
	if want := "snapshot s: " + held.Error(); status.Code(err) != codes.FailedPrecondition || status.Convert(err).Message() != want || HeldBy(err) != "n2" {
		t.Errorf("%v, held by %q; want %q", err, HeldBy(err), want)
	}
	for _, err := range []error{
		nil, errors.New("n2"), held,
		toGRPC(&storage.HeldError{VolumeID: "v", Holder: held.Holder}),
		toGRPC(fmt.Errorf("%s writes to it: %w", held.Holder, errdefs.ErrFailedPrecondition)),
	} {
		if by := HeldBy(err); by != "" {
			t.Errorf("%v is held by %q", err, by)
		}
	}
}
