package image

import (
	"encoding/base64"
	"net/http"
	"os"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/openatoll/atoll/storage"
)

// A listener collects the damage that is told.
type listener struct {
	mu   sync.Mutex
	told []storage.Damage
}

func (l *listener) hear(d storage.Damage) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.told = append(l.told, d)
}

// take returns what was told since the last call.
func (l *listener) take() []storage.Damage {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer func() { l.told = nil }()
	return l.told
}

func (l *listener) want(t *testing.T, what string, want ...storage.Damage) {
	t.Helper()
	if got := l.take(); !(len(got) == 0 && len(want) == 0) && !reflect.DeepEqual(got, want) {
		t.Errorf("%s: told %+v, want %+v", what, got, want)
	}
}

func (s *Store) checking(user string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.damages.checks[user]
}

// Who has a damaged file hears what became of it; who gets a whole one does not.
func TestDamageIsTold(t *testing.T) {
	image, _, high := twoLayers(t, "told")
	ref := serveImage(t, nil, image)
	s := newStore(t, Config{})
	img, err := s.Pull(t.Context(), ref, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	disk := func(user string) {
		t.Helper()
		if _, err := s.Disk(t.Context(), img.ID, user); err != nil {
			t.Fatal(err)
		}
	}
	disk("old_0")
	hold := func(users ...string) (holds []storage.Hold) {
		for _, u := range users {
			holds = append(holds, storage.Hold{User: u, Image: ref})
		}
		return holds
	}
	var l listener
	flip(t, s.layerPath(high, dataSuffix), 0)
	disk("new_0") // told once somebody listens
	s.Damages(l.hear)
	l.want(t, "a layer", storage.Damage{Layer: high.String(), Mended: true, Holds: hold("old_0")})

	flip(t, s.metaPath(img.ID), 1040)
	disk("newer_0")
	l.want(t, "metadata", storage.Damage{Mended: true, Holds: hold("new_0", "old_0")})

	os.Remove(s.metaPath(img.ID))
	disk("newest_0")
	l.want(t, "nothing that a guest reads")

	flip(t, s.layerPath(high, dataSuffix), 5000)
	s.Recheck("nobody_0")
	s.Recheck("newest_0")
	for deadline := time.Now().Add(time.Minute); s.Counts().DamagedLayers < 2 || s.checking("newest_0"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the damage was not found")
		}
	}
	l.want(t, "found by a check", storage.Damage{Layer: high.String(), Mended: true, Holds: hold("new_0", "newer_0", "newest_0", "old_0")})

	for range 2 { // the second finds a record of damage
		flip(t, s.metaPath(img.ID), 1040)
		if err := s.recheck(t.Context(), "old_0"); err != nil {
			t.Error(err)
		}
	}
	l.want(t, "metadata that nobody wants", storage.Damage{Mended: true, Holds: hold("new_0", "newer_0", "newest_0", "old_0")})
	disk("last_0")
	l.want(t, "metadata that was told of")
	if n := s.Counts(); n.DamagedLayers != 2 || n.DamagedMetadata != 2 {
		t.Errorf("counts %+v", n)
	}
}

// Without credentials a layer stays damaged until a pull; both is told, once.
func TestDamageOfAPrivateImageIsTold(t *testing.T) {
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("ann:secret"))
	image, _, high := twoLayers(t, "told")
	ref := serveImage(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Header.Get("Authorization") != basic {
				w.Header().Set("WWW-Authenticate", `Basic realm="here"`)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			next.ServeHTTP(w, req)
		})
	}, image)
	auth := &storage.Auth{Username: "ann", Password: "secret"}
	s := newStore(t, Config{})
	var l listener
	s.Damages(l.hear)
	img, err := s.Pull(t.Context(), ref, auth, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Disk(t.Context(), img.ID, "old_0"); err != nil {
		t.Fatal(err)
	}
	flip(t, s.layerPath(high, dataSuffix), 12345)
	for range 2 {
		if _, err := s.Disk(t.Context(), img.ID, "new_0"); err == nil {
			t.Error("a damaged disk was given")
		}
	}
	holds := []storage.Hold{{User: "old_0", Image: ref}}
	l.want(t, "no credentials", storage.Damage{Layer: high.String(), Holds: holds})
	if _, err := s.Pull(t.Context(), ref, auth, nil); err != nil {
		t.Fatal(err)
	}
	l.want(t, "pulled", storage.Damage{Layer: high.String(), Mended: true, Holds: holds})
}
