package tap

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/netplugin"
)

// A record is all that is stored about an attachment.
type record struct {
	Key       string               `json:"key"`
	Namespace string               `json:"namespace"`
	Name      string               `json:"name"`
	Address   netip.Addr           `json:"address"`
	MTU       int                  `json:"mtu"`
	HostPorts []netplugin.HostPort `json:"hostPorts,omitempty"`
	// Sequence counts attachments; the highest tells where to go on handing
	// out addresses after a restart.
	Sequence uint64 `json:"sequence"`
}

func (r record) tap() string { return tapName(r.Key) }

func (r record) attachment() netplugin.Attachment {
	return netplugin.Attachment{
		Key: r.Key, Tap: r.tap(), MAC: macOf(r.Key), MTU: r.MTU,
		Addresses: []netip.Prefix{netip.PrefixFrom(r.Address, 32)},
		Routes: []netplugin.Route{
			{Destination: netip.PrefixFrom(Gateway, 32)},
			{Destination: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Gateway: Gateway},
		},
		HostPorts: r.HostPorts,
	}
}

// A store is a directory with one file a record, named by its tap: keys come
// from outside and may hold anything.
type store struct{ dir string }

func (s store) file(key string) string { return filepath.Join(s.dir, tapName(key)+".json") }

// load reads all records. A file that cannot be read stops it: to go on
// without it would hand out its address again.
func (s store) load() (map[string]record, error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, fmt.Errorf("pod network: %w", err)
	}
	files, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("pod network: %w", err)
	}
	records := map[string]record{}
	for _, f := range files {
		path := filepath.Join(s.dir, f.Name())
		if strings.HasPrefix(f.Name(), ".") { // a save that was cut short
			if err := os.Remove(path); err != nil {
				return nil, fmt.Errorf("pod network: %w", err)
			}
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("pod network: %w", err)
		}
		var r record
		if err := json.Unmarshal(b, &r); err != nil || path != s.file(r.Key) || !r.Address.Is4() {
			return nil, fmt.Errorf("pod network: record %s is damaged: remove it and the pod it belongs to: %w", path, errdefs.ErrDataLoss)
		}
		records[r.Key] = r
	}
	return records, nil
}

// names returns the taps that there are records of, readable or not.
func (s store) names() ([]string, error) {
	files, err := os.ReadDir(s.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var names []string
	for _, f := range files {
		name := strings.TrimSuffix(strings.TrimPrefix(f.Name(), "."), ".json")
		if strings.HasPrefix(name, "atl") {
			names = append(names, name)
		}
	}
	return names, err
}

// save is atomic against a crash of the process. It does not wait for the
// disk: after a crash of the host nothing is left for the record to explain.
func (s store) save(r record) error {
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	path := s.file(r.Key)
	tmp := filepath.Join(s.dir, "."+filepath.Base(path))
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		os.Remove(tmp)
		return fmt.Errorf("pod network: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		os.Remove(tmp)
		return fmt.Errorf("pod network: %w", err)
	}
	return nil
}

func (s store) remove(key string) error {
	if err := os.Remove(s.file(key)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("pod network: %w", err)
	}
	return nil
}
