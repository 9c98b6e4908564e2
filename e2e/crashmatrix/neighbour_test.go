package crashmatrix

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A neighbour is the pod that must not notice anything.
type neighbour struct {
	*pod
	node      *node
	container string // its ID
	started   int64
	pids      []int
	file      string
	seen      int // lines that were checked last
}

// counts writes a number after the other, four a second.
const counts = `i=0; while :; do i=$((i+1)); echo "line $i"; sleep 0.25; done`

func startNeighbour(t *testing.T, n *node, image string) *neighbour {
	t.Helper()
	p := n.newPod(uidPrefix() + "neighbour")
	ctx, cancel := context.WithTimeout(t.Context(), 2*rpcTimeout)
	defer cancel()
	if err := n.runPod(ctx, p); err != nil {
		t.Fatal(err)
	}
	c, err := n.container(p, "counter", image, counts)
	if err != nil {
		t.Fatal(err)
	}
	id, err := n.create(ctx, p, c)
	if err == nil {
		err = n.startContainer(ctx, id)
	}
	if err != nil {
		t.Fatal(err)
	}
	st, err := n.status(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	qs, err := n.qemus()
	if err != nil || len(qs[p.key()]) != 1 {
		t.Fatalf("QEMUs %v, %v", qs, err)
	}
	return &neighbour{pod: p, node: n, container: id, started: st.StartedAt, pids: qs[p.key()], file: p.logFile(c)}
}

// states tells what is wrong with the neighbour in a daemon's answers.
func (b *neighbour) states(v view) error {
	s := v.sandboxOf(b.uid())
	if s == nil || s.Id != b.sandbox || s.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		return fmt.Errorf("the neighbour is not ready: %v", s)
	}
	c := v.container(b.container)
	if c == nil || c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return fmt.Errorf("the neighbour's container does not run: %v", c)
	}
	qs, err := b.node.qemus()
	if err == nil && !slices.Equal(qs[b.key()], b.pids) {
		err = fmt.Errorf("the neighbour's QEMU was process %v and is %v", b.pids, qs[b.key()])
	}
	return err
}

// undisturbed looks at all of it, and waits until the log goes on.
func (b *neighbour) undisturbed(ctx context.Context) error {
	st, err := b.node.status(ctx, b.container)
	if err != nil {
		return err
	}
	if st.StartedAt != b.started {
		return fmt.Errorf("the neighbour's container started at %d, and now says %d", b.started, st.StartedAt)
	}
	before := b.seen
	for deadline := time.Now().Add(patience); ; {
		lines, err := b.lines()
		if err != nil {
			return err
		}
		if lines > before {
			b.seen = lines
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the neighbour's log has ended at line %d", lines)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// lines counts those of the log, each of which must be the one after the last.
func (b *neighbour) lines() (int, error) {
	text, err := os.ReadFile(b.file)
	if err != nil {
		return 0, err
	}
	last := 0
	for line := range bytes.Lines(text) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			break // being written
		}
		// 2025-01-01T00:00:00.000000000Z stdout F line 1
		f := strings.Fields(string(line))
		if len(f) != 5 || f[3] != "line" {
			return last, fmt.Errorf("the neighbour's log has a line %q", line)
		}
		if i, err := strconv.Atoi(f[4]); err != nil || i != last+1 {
			return last, fmt.Errorf("the neighbour's log has line %s after line %d", f[4], last)
		}
		last++
	}
	return last, nil
}
