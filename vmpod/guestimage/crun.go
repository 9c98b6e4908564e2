package guestimage

import (
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
)

//go:embed crun/build.sh
var crunScript []byte

// crunRecord is crun.json, which crun/build.sh writes beside a static crun.
type crunRecord struct {
	Version   string `json:"version"`   // of the source package
	Script    string `json:"script"`    // hash of the script that built it
	Installed string `json:"installed"` // hash of the package's crun at that time
}

// crunEntries returns crun for the initramfs: the static one in dir, if it was
// built from the package that is installed now, else the package's own with
// its libraries. An upgrade of the package so never leaves an old one in use.
func crunEntries(dir string, log *slog.Logger) ([]entry, error) {
	current, err := staticCrunIsCurrent(dir)
	if err != nil {
		return nil, fmt.Errorf("guest image: static crun: %w", err)
	}
	if !current {
		log.Info("the guest gets the distribution's crun; containers start faster with a static one", "cure", "make guest-crun")
		return programEntries("crun", "crun")
	}
	file := filepath.Join(dir, "crun")
	if err := requireStatic(file); err != nil {
		return nil, err
	}
	e, err := fileEntry("/usr/bin/crun", file, 0o755)
	return []entry{e}, err
}

func staticCrunIsCurrent(dir string) (bool, error) {
	text, err := os.ReadFile(filepath.Join(dir, "crun.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	var r crunRecord
	if err := json.Unmarshal(text, &r); err != nil {
		return false, fmt.Errorf("%s: %w", dir, err)
	}
	file, err := exec.LookPath("crun")
	if err != nil {
		return false, nil // programEntries says what to install
	}
	installed, err := os.ReadFile(file)
	if err != nil {
		return false, err
	}
	return r.Script == hexHash(crunScript) && r.Installed == hexHash(installed), nil
}
