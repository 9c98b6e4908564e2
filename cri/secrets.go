package cri

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A secretStore keeps what of containers may hold secrets: environments come
// from Secrets, and are expanded into commands and arguments. It is for the
// next server process alone, whose execs need it, and not for the disk: its
// directory is on a tmpfs, and goes with the host's next start, as the VMs do.
// The zero secretStore keeps nothing.
type secretStore struct{ dir string }

// containerSecrets is one file.
type containerSecrets struct {
	Config  []byte          `json:"config"` // a ContainerConfig with the secret fields alone
	Process json.RawMessage `json:"process"`
}

const secretsSuffix = ".json"

func (s secretStore) file(id string) string { return filepath.Join(s.dir, id+secretsSuffix) }

// save keeps the secrets of a new container.
func (s secretStore) save(c *container) error {
	if s.dir == "" {
		return nil
	}
	config, err := proto.Marshal(&runtimeapi.ContainerConfig{Envs: c.Config.GetEnvs(), Command: c.Config.GetCommand(), Args: c.Config.GetArgs()})
	if err != nil {
		return err
	}
	b, err := json.Marshal(containerSecrets{Config: config, Process: c.Process})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	tmp := s.file("." + c.ID)
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return errors.Join(err, s.remove("."+c.ID))
	}
	return os.Rename(tmp, s.file(c.ID))
}

// load gives a container from the disk back what was kept of it. One whose
// secrets are gone stays without: the host has been started anew.
func (s secretStore) load(c *container) error {
	if s.dir == "" {
		return nil
	}
	b, err := os.ReadFile(s.file(c.ID))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var kept containerSecrets
	var config runtimeapi.ContainerConfig
	if err := json.Unmarshal(b, &kept); err != nil {
		return fmt.Errorf("%s: %w", s.file(c.ID), err)
	}
	if err := proto.Unmarshal(kept.Config, &config); err != nil {
		return fmt.Errorf("%s: %w", s.file(c.ID), err)
	}
	c.Config.Envs, c.Config.Command, c.Config.Args = config.Envs, config.Command, config.Args
	c.Process = kept.Process
	return nil
}

func (s secretStore) remove(id string) error {
	if s.dir == "" {
		return nil
	}
	if err := os.Remove(s.file(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// sweep removes what belongs to no container that is known.
func (s secretStore) sweep(known map[string]*container) error {
	if s.dir == "" {
		return nil
	}
	entries, err := os.ReadDir(s.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), secretsSuffix)
		if ok && known[id] == nil {
			err = errors.Join(err, s.remove(id))
		}
	}
	return err
}

// withoutSecrets is the record as it may be written to the disk.
func (c *container) withoutSecrets() *container {
	r := *c
	r.Process = nil
	return &r
}

// publicConfig is what of a container's config may be written to the disk.
func publicConfig(config *runtimeapi.ContainerConfig) *runtimeapi.ContainerConfig {
	out := proto.Clone(config).(*runtimeapi.ContainerConfig)
	out.Envs, out.Command, out.Args = nil, nil, nil
	return out
}
