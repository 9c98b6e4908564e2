package login

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func revokedSession(n int, life time.Duration) Session {
	return Session{ID: fmt.Sprintf("%032x", n), Expires: epoch.Add(life)}
}

func TestRevocationsSurvive(t *testing.T) {
	file := filepath.Join(t.TempDir(), "revoked")
	open := func(now time.Time, wantMissing bool) *revocations {
		t.Helper()
		r, missing, err := openRevocations(file, now)
		if err != nil || missing != wantMissing {
			t.Fatalf("missing %v, err %v", missing, err)
		}
		return r
	}
	r := open(epoch, true)
	for i := range 3 {
		if err := r.add(revokedSession(i, time.Duration(i+1)*time.Hour)); err != nil {
			t.Fatal(err)
		}
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	r = open(epoch.Add(time.Minute), false)
	for i := range 3 {
		if !r.has(revokedSession(i, 0).ID) {
			t.Errorf("%d is forgotten", i)
		}
	}
	// A crash in the middle of a line costs that line alone, and not the next.
	f, err := os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(f, "0123456789abcdef")
	f.Close()
	if err := r.add(revokedSession(7, 9*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if r = open(epoch.Add(90*time.Minute), false); !r.has(revokedSession(7, 0).ID) || !r.has(revokedSession(1, 0).ID) {
		t.Errorf("after half a line: %v", r.ids)
	}
	if r.has(revokedSession(0, 0).ID) {
		t.Error("one that has expired is kept")
	}
	if err := r.upkeep(epoch.Add(24 * time.Hour)); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(file); err != nil || len(bytes.TrimSpace(b)) > 0 {
		t.Errorf("a day later the file holds %q, %v", b, err)
	}
}

func TestRevocationsAreBounded(t *testing.T) {
	r, _, err := openRevocations(filepath.Join(t.TempDir(), "revoked"), epoch)
	if err != nil {
		t.Fatal(err)
	}
	for i := range maxRevoked {
		r.ids[revokedSession(i, time.Hour).ID] = epoch.Add(time.Hour).Unix()
	}
	if err := r.add(revokedSession(maxRevoked, time.Hour)); err == nil {
		t.Error("one more was taken")
	}
	if err := r.add(revokedSession(5, time.Hour)); err != nil {
		t.Errorf("one that is there: %v", err)
	}
}
