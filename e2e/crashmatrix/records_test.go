package crashmatrix

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// While no daemon runs, its records can be read and its guests be asked.

// recordsAgree compares what the dead daemon had said last with what it had
// written down. intents are what may still be promised.
func (n *node) recordsAgree(v view, intents map[string]bool) (wrong []string) {
	note := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	err := readDB(filepath.Join(n.data, "cri", "cri.db"), func(tx *bolt.Tx) error {
		each(tx.Bucket([]byte("intents")), func(k, _ []byte) {
			if !intents[string(k)] {
				note("intent %s: it was never dropped", k)
			}
		})
		seen := 0
		each(tx.Bucket([]byte("sandboxes")), func(_, b []byte) {
			var r struct {
				ID    string
				State runtimeapi.PodSandboxState
			}
			seen++
			if err := json.Unmarshal(b, &r); err != nil {
				note("sandbox record %q: %v", b, err)
			}
			for _, s := range v.sandboxes {
				if s.Id == r.ID && s.State == r.State {
					return
				}
			}
			note("sandbox %s is recorded as %s, and was not listed so", r.ID, r.State)
		})
		if seen != len(v.sandboxes) {
			note("%d sandboxes are recorded, %d were listed", seen, len(v.sandboxes))
		}
		seen = 0
		each(tx.Bucket([]byte("containers")), func(_, b []byte) {
			var r struct {
				ID    string
				State runtimeapi.ContainerState
			}
			seen++
			if err := json.Unmarshal(b, &r); err != nil {
				note("container record %q: %v", b, err)
			}
			if c := v.container(r.ID); c == nil || c.State != r.State {
				note("container %s is recorded as %s, and was not listed so", r.ID, r.State)
			}
			if bytes.Contains(b, []byte("secret")) {
				note("container %s: its record tells the secret", r.ID)
			}
		})
		if seen != len(v.containers) {
			note("%d containers are recorded, %d were listed", seen, len(v.containers))
		}
		each(tx.Bucket([]byte("cursors")), func(k, _ []byte) {
			if v.container(string(k)) == nil {
				note("log cursor of container %s: there is no such container", k)
			}
		})
		return nil
	})
	if err != nil {
		note("cri.db: %v", err)
	}
	return append(wrong, n.imagesAgree(v, intents)...)
}

// imagesAgree looks at what the image store has promised to whom.
func (n *node) imagesAgree(v view, intents map[string]bool) (wrong []string) {
	note := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	ready := v.ready()
	err := readDB(filepath.Join(n.data, "images", "images.db"), func(tx *bolt.Tx) error {
		each(tx.Bucket([]byte("atoll.holds")), func(k, _ []byte) {
			user, image, _ := strings.Cut(string(k), "\x00")
			if !ready[user] && !intents[user] {
				note("image %.19s is held for %s, which is not ready", image, user)
			}
		})
		leases := bucket(tx, "v1", "atoll", "leases")
		each(leases, func(k, _ []byte) { note("image lease %s: no pull is under way", k) })
		return nil
	})
	if err != nil {
		note("images.db: %v", err)
	}
	return wrong
}

func readDB(path string, read func(*bolt.Tx) error) error {
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: 10 * time.Second})
	if err != nil {
		return err
	}
	defer db.Close()
	return db.View(read)
}

func bucket(tx *bolt.Tx, path ...string) *bolt.Bucket {
	b := tx.Bucket([]byte(path[0]))
	for _, name := range path[1:] {
		if b == nil {
			return nil
		}
		b = b.Bucket([]byte(name))
	}
	return b
}

func each(b *bolt.Bucket, visit func(k, v []byte)) {
	if b != nil {
		_ = b.ForEach(func(k, v []byte) error { visit(k, v); return nil }) // visit gives no errors
	}
}

// guestsAgree asks every guest what containers it has.
func (n *node) guestsAgree(ctx context.Context, v view) (wrong []string) {
	for _, s := range v.sandboxes {
		if s.State != runtimeapi.PodSandboxState_SANDBOX_READY {
			continue
		}
		there, err := n.askGuest(ctx, s)
		if err != nil {
			wrong = append(wrong, fmt.Sprintf("guest of %s: %v", s.Metadata.Uid, err))
			continue
		}
		for _, c := range v.containers {
			if c.PodSandboxId != s.Id {
				continue
			}
			phase, ok := there[c.Id]
			delete(there, c.Id)
			if want := phases[c.State]; !ok || phase != want {
				wrong = append(wrong, fmt.Sprintf("container %s of %s was listed as %s, and in the guest it is %q", c.Metadata.Name, s.Metadata.Uid, c.State, phase))
			}
		}
		for id := range there {
			wrong = append(wrong, fmt.Sprintf("container %s of %s is in the guest, and no record knows it", id, s.Metadata.Uid))
		}
	}
	return wrong
}

var phases = map[runtimeapi.ContainerState]string{
	runtimeapi.ContainerState_CONTAINER_CREATED: agentapi.ContainerState_CREATED.String(),
	runtimeapi.ContainerState_CONTAINER_RUNNING: agentapi.ContainerState_RUNNING.String(),
	runtimeapi.ContainerState_CONTAINER_EXITED:  agentapi.ContainerState_EXITED.String(),
}

func (n *node) askGuest(ctx context.Context, s *runtimeapi.PodSandbox) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	key := fmt.Sprintf("%s_%d", s.Metadata.Uid, s.Metadata.Attempt)
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", n.socketsOf(key)+".agent")
	if err != nil {
		return nil, err
	}
	client, err := agentapi.Attach(ctx, conn)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	hello, err := client.Hello(ctx, &agentapi.HelloRequest{HostVersion: "matrix"})
	if err != nil {
		return nil, err
	}
	there := map[string]string{}
	for _, c := range hello.GetContainers() {
		there[c.Id] = c.Phase.String()
	}
	return there, nil
}
