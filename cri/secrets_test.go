package cri

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// holds tells whether a file below dir contains text.
func holds(t *testing.T, dir, text string) bool {
	t.Helper()
	found := false
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		found = found || bytes.Contains(b, []byte(text))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// A Secret that reaches a container by its environment or its arguments is in
// the directory for secrets alone, survives a restart of the server there, and
// goes with the container.
func TestSecretsStayOffTheDisk(t *testing.T) {
	const secret = "hunter2-on-no-disk"
	h, dir := newFakeHost(), t.TempDir()
	state, run := filepath.Join(dir, "cri"), filepath.Join(dir, "run")
	s := serve(t, h, dir)
	sb := s.run(t)
	config := ctrConfig("main")
	config.Envs = append(config.Envs, &runtimeapi.KeyValue{Key: "PASSWORD", Value: []byte(secret)})
	config.Args = append(config.Args, "--password="+secret)
	id := s.create(t, sb, config)
	s.start(t, id)
	s.stop()
	if holds(t, state, secret) {
		t.Fatal("a secret of the environment is in the state file")
	}
	if !holds(t, run, secret) {
		t.Fatal("the next server cannot know the environment")
	}
	s = serve(t, h, dir)
	c, ok := s.store.container(id)
	if !ok || !bytes.Contains(c.Process, []byte("PASSWORD="+secret)) || !strings.HasSuffix(c.Config.Args[len(c.Config.Args)-1], secret) {
		t.Fatalf("after a restart: %+v", c)
	}
	s.remove(t, sb)
	if holds(t, run, secret) || holds(t, state, secret) {
		t.Fatal("a secret outlived its container")
	}
}

// A host that was started anew has lost the secrets, and no container.
func TestSecretsAreGone(t *testing.T) {
	h, dir := newFakeHost(), t.TempDir()
	s := serve(t, h, dir)
	id := s.create(t, s.run(t), ctrConfig("main"))
	s.stop()
	if err := os.RemoveAll(filepath.Join(dir, "run")); err != nil {
		t.Fatal(err)
	}
	s = serve(t, h, dir)
	defer s.stop()
	if st := s.status(t, id); st.Metadata.Name != "main" {
		t.Fatalf("status: %v", st)
	}
}
