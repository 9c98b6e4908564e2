package guestimage

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

// A static crun is used only as long as it is of this script and of the crun
// that is installed.
func TestStaticCrunIsCurrent(t *testing.T) {
	bin, dir := t.TempDir(), t.TempDir()
	t.Setenv("PATH", bin)
	installed := filepath.Join(bin, "crun")
	if err := os.WriteFile(installed, []byte("one"), 0o755); err != nil {
		t.Fatal(err)
	}
	check := func(want bool) {
		t.Helper()
		if got, err := staticCrunIsCurrent(dir); got != want || err != nil {
			t.Errorf("current is %v, %v; want %v", got, err, want)
		}
	}
	check(false) // none was built
	text, err := json.Marshal(crunRecord{Version: "1", Script: hexHash(crunScript), Installed: hexHash([]byte("one"))})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "crun.json"), text, 0o644); err != nil {
		t.Fatal(err)
	}
	check(true)
	if err := os.WriteFile(installed, []byte("two"), 0o755); err != nil { // the package was upgraded
		t.Fatal(err)
	}
	check(false)
	if err := os.Remove(installed); err != nil {
		t.Fatal(err)
	}
	check(false)
}
