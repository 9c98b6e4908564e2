package storage_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/storage"
)

func TestKeysDoNotPrint(t *testing.T) {
	const secret = "correct horse battery"
	a := storage.Attachment{VolumeID: "v", Key: storage.Key(secret)}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("attached", "attachment", a, "key", a.Key)
	js, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	said := []string{log.String(), string(js)}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		said = append(said, fmt.Sprintf(verb, a), fmt.Sprintf(verb, a.Key))
	}
	raw, hex := fmt.Sprint([]byte(secret)), fmt.Sprintf("%x", secret)
	for _, s := range said {
		if strings.Contains(s, secret) || strings.Contains(s, raw[1:len(raw)-1]) || strings.Contains(s, hex) || strings.Contains(s, "Y29ycmVjdC") {
			t.Errorf("a key is shown: %s", s)
		}
	}
}

func TestDiskIDsFitSerials(t *testing.T) {
	a, b := storage.DiskID("ds-1.abc"), storage.DiskID("ds-1.abd")
	if a == b || !regexp.MustCompile(`^[a-z0-9-]{20}$`).MatchString(a) || a != storage.DiskID("ds-1.abc") {
		t.Errorf("DiskID = %q and %q", a, b)
	}
}

func TestTopologyFits(t *testing.T) {
	shared := storage.Topology{Datastore: "nfs"}
	local := storage.Topology{Host: "a", Datastore: "ssd"}
	for _, c := range []struct {
		have, want storage.Topology
		fits       bool
	}{
		{shared, storage.Topology{}, true},
		{shared, storage.Topology{Host: "b"}, true},
		{local, storage.Topology{Host: "a"}, true},
		{local, storage.Topology{Host: "b"}, false},
		{local, shared, false},
	} {
		if got := c.have.Fits(c.want); got != c.fits {
			t.Errorf("%+v fits %+v: %v", c.have, c.want, got)
		}
	}
}

func TestHeldErrorNamesTheHolder(t *testing.T) {
	err := fmt.Errorf("attach: %w", &storage.HeldError{VolumeID: "ds.v", Holder: storage.Holder{VM: "u_0", Host: "node-a"}})
	var held *storage.HeldError
	if !errdefs.IsFailedPrecondition(err) || !errors.As(err, &held) || !strings.Contains(err.Error(), "u_0") || !strings.Contains(err.Error(), "node-a") {
		t.Errorf("%v", err)
	}
}
