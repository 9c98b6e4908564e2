package login

import (
	"context"
	"errors"
	"net/netip"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/component-base/metrics/testutil"

	"github.com/openatoll/atoll/internal/sso"
	"github.com/openatoll/atoll/supervisor/login/loginapi"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// fakeDirectory has everybody, nobody, or does not answer.
type fakeDirectory struct {
	asked atomic.Int32
	gone  atomic.Bool
	down  atomic.Bool
}

func (f *fakeDirectory) Exists(context.Context, sso.Principal) (bool, error) {
	f.asked.Add(1)
	if f.down.Load() {
		return false, errors.New("vCenter is away")
	}
	return !f.gone.Load(), nil
}

func (w *world) good(token string) bool {
	w.t.Helper()
	_, status := w.review(ReviewerName, token)
	return status.Authenticated
}

// TestRemovedUserLosesTokens within recheckEvery, never for what is unknown, and
// for good, also over a restart and for a later user of the name.
func TestRemovedUserLosesTokens(t *testing.T) {
	w := newWorld(t)
	w.stop()
	directory := &fakeDirectory{}
	w.o.Directory = directory
	w.start()
	token := w.login()
	now := epoch
	after := func(d time.Duration) { now = now.Add(d); w.set(now) }
	for range 3 {
		if !w.good(token) {
			t.Fatal("refused while the user is there")
		}
	}
	if n := directory.asked.Load(); n != 2 { // at the login, and once for all reviews
		t.Errorf("vCenter was asked %d times", n)
	}
	directory.down.Store(true)
	directory.gone.Store(true)
	after(recheckEvery)
	before := directory.asked.Load()
	for range 3 {
		if !w.good(token) {
			t.Fatal("refused on an unknown")
		}
	}
	if n := directory.asked.Load() - before; n != 1 {
		t.Errorf("a vCenter that does not answer was asked %d times", n)
	}
	directory.down.Store(false)
	after(recheckPause)
	if w.good(token) {
		t.Fatal("the token of a user who is gone is good")
	}
	if status, body := w.user("GET", loginapi.WorkloadsPath, withBearer(token)); status != 401 {
		t.Errorf("workloads: %d %s", status, body)
	}
	directory.gone.Store(false)
	after(recheckEvery)
	if w.good(token) {
		t.Error("good again for a later user of the name")
	}
	if later := w.login(); !w.good(later) {
		t.Error("a later user of the name is refused")
	}
	w.stop()
	w.start()
	if w.good(token) {
		t.Error("good again after a restart")
	}
}

// TestUnlistedUserKeepsTokens: of some identity sources vCenter lists nobody.
func TestUnlistedUserKeepsTokens(t *testing.T) {
	for what, set := range map[string]func(*fakeDirectory){
		"not listed": func(f *fakeDirectory) { f.gone.Store(true) },
		"unknown":    func(f *fakeDirectory) { f.down.Store(true) },
	} {
		t.Run(what, func(t *testing.T) {
			w := newWorld(t)
			w.stop()
			directory := &fakeDirectory{}
			set(directory)
			w.o.Directory = directory
			w.start()
			token := w.login()
			directory.down.Store(false)
			w.set(epoch.Add(2 * recheckEvery))
			if !w.good(token) {
				t.Error("refused")
			}
		})
	}
}

func TestLoginMetrics(t *testing.T) {
	w := newWorld(t)
	count := func(result string) float64 {
		n, err := testutil.GetCounterMetricValue(loginsTotal.WithLabelValues(result))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	tokens := func(event string) float64 {
		n, err := testutil.GetCounterMetricValue(tokensTotal.WithLabelValues(event))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	was := map[string]float64{}
	for _, r := range []string{"ok", "refused", "limited", "unknown"} {
		was[r] = count(r)
	}
	for _, e := range []string{tokenIssued, tokenRevoked, tokenExpired} {
		was[e] = tokens(e)
	}
	token, expired := w.login(), w.login()
	w.user("POST", loginapi.LogoutPath, withBearer(token))
	w.users.down.Store(true)
	w.user("POST", loginapi.LoginPath, basic("ada@vsphere.local", "right"))
	w.users.down.Store(false)
	for range maxFailures + 1 {
		w.user("POST", loginapi.LoginPath, basic("ada@vsphere.local", "wrong"))
	}
	w.set(epoch.Add(2 * time.Hour))
	w.good(expired)
	for name, want := range map[string]float64{"ok": 2, "unknown": 1, "refused": maxFailures, "limited": 1} {
		if got := count(name) - was[name]; got != want {
			t.Errorf("logins %s: %v, want %v", name, got, want)
		}
	}
	for name, want := range map[string]float64{tokenIssued: 2, tokenRevoked: 1, tokenExpired: 1} {
		if got := tokens(name) - was[name]; got != want {
			t.Errorf("tokens %s: %v, want %v", name, got, want)
		}
	}
}

// TestUserDirectory asks a vCenter.
func TestUserDirectory(t *testing.T) {
	vc, err := vcsim.New(vcsim.Config{Dir: filepath.Join(t.TempDir(), "vc"), AdminPassword: "correct horse", PasswordRounds: 1000, Listen: netip.MustParseAddrPort("127.0.0.1:0")})
	if err != nil {
		t.Fatal(err)
	}
	if err := vc.Users().Set("ann", "correct horse"); err != nil {
		t.Fatal(err)
	}
	d := &UserDirectory{
		VCenter: func(context.Context) (VCenter, error) { return VCenter{Address: vc.URL().Host, CA: vc.CA()}, nil },
		Credentials: func(context.Context) (string, string, error) {
			return "Administrator@vsphere.local", "correct horse", nil
		},
	}
	ann := sso.Principal{Name: "ann", Domain: "vsphere.local"}
	if there, err := d.Exists(t.Context(), ann); err != nil || !there {
		t.Errorf("ann: %v %v", there, err)
	}
	if there, err := d.Exists(t.Context(), sso.Principal{Name: "an", Domain: "vsphere.local"}); err != nil || there {
		t.Errorf("the beginning of a name: %v %v", there, err)
	}
	if err := vc.Users().Remove("ann"); err != nil {
		t.Fatal(err)
	}
	if there, err := d.Exists(t.Context(), ann); err != nil || there {
		t.Errorf("ann, removed: %v %v", there, err)
	}
	if err := vc.Close(); err != nil {
		t.Fatal(err)
	}
	if there, err := d.Exists(t.Context(), ann); err == nil {
		t.Errorf("without a vCenter: %v", there)
	}
}
