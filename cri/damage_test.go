package cri

import (
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
)

// rottenImages tell of damage.
type rottenImages struct {
	fakeImages
	tell func(storage.Damage)

	mu        sync.Mutex
	rechecked []string
}

func (r *rottenImages) Damages(fn func(storage.Damage)) { r.tell = fn }

func (r *rottenImages) Recheck(user string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rechecked = append(r.rechecked, user)
}

func (r *rottenImages) checked() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.rechecked)
}

// Damage reaches the pods that have it, and a disk that fails has the images
// looked at.
func TestDamageReachesPods(t *testing.T) {
	h := newFakeHost()
	images := &rottenImages{fakeImages: fakeImages{h}}
	s := serve(t, h, t.TempDir(), withPace, func(c *Config) { c.Images = images })
	notices := make(chan vmpod.Notice, 10)
	s.Notices(func(n vmpod.Notice) { notices <- n })
	s.run(t)
	vm := vmpod.ID{PodUID: podUID}.String()
	for _, tc := range []struct {
		damage storage.Damage
		words  []string
	}{
		{storage.Damage{Layer: "sha256:abc", Mended: true}, []string{"Layer sha256:abc of image registry/app:v1 is damaged", "it was fetched again", "keeps the damaged file"}},
		{storage.Damage{Layer: "sha256:abc"}, []string{"Layer sha256:abc of image registry/app:v1 is damaged", "will be pulled again", "keeps the damaged file"}},
		{storage.Damage{Mended: true}, []string{"metadata of image registry/app:v1 is damaged", "it is made again", "keeps the damaged file"}},
	} {
		tc.damage.Holds = []storage.Hold{{User: "not an ID", Image: "x"}, {User: "gone_7", Image: "x"}, {User: vm, Image: "registry/app:v1"}}
		images.tell(tc.damage)
		n := <-notices
		if n.PodUID != podUID || n.Namespace != "default" || n.Name != "web" || n.Reason != vmpod.ReasonImageDamaged || n.At.IsZero() {
			t.Errorf("%+v", n)
		}
		for _, w := range tc.words {
			if !strings.Contains(n.Message, w) {
				t.Errorf("%q does not say %q", n.Message, w)
			}
		}
	}
	if len(notices) > 0 {
		t.Errorf("one more: %+v", <-notices)
	}
	if got := images.checked(); len(got) > 0 {
		t.Errorf("%v were looked at for nothing", got)
	}
	h.status.Store(&vmpod.Status{State: vmpod.StateRunning, Reason: vmpod.ReasonHostDiskFull, Message: "full"})
	told := listen(s)
	eventually(t, "full", func() bool { return strings.Contains(told(), "HostDiskFull") })
	h.status.Store(&vmpod.Status{State: vmpod.StateRunning, Reason: vmpod.ReasonHostDiskError, Message: "cannot read"})
	eventually(t, "looked at", func() bool { return slices.Equal(images.checked(), []string{vm}) })
}
