package cri

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
)

var (
	powerCuts = flag.Int("power-cuts", 2, "how often TestPowerCut cuts the power")
	powerSeed = flag.Uint64("power-seed", 0, "of the writes that are the last ones and of what the disks lose; 0 chooses one")
)

// powerCutVolumes are the volumes of the test: name and file system. That of
// the liar is on a disk that does not do what a flush asks for.
var powerCutVolumes = []struct{ name, fsType string }{{"ext", "ext4"}, {"xfs", "xfs"}, {"liar", "ext4"}}

// powerCutScript writes to each volume numbered values with fsync, saying each
// when that has returned, and other files without.
const powerCutScript = `count() {
  n=0; [ ! -e /$1/log ] || n=$(( $(wc -c < /$1/log) / 16 ))
  echo "$1 begin $n"
  while n=$((n+1)); printf '%015d\n' $n | dd of=/$1/log oflag=append conv=notrunc,fsync bs=16 2> /dev/null; do echo "$1 wrote $n"; done
}
litter() {
  while i=$((i+1)); do
    echo "$i and more" > /$1/litter-$((i % 40)); : > /$1/empty-$((i % 7))
    dd if=/dev/urandom of=/$1/direct bs=4096 count=4 seek=$((i % 50)) conv=notrunc oflag=direct
  done 2> /dev/null
}
for v in ext xfs liar; do count $v & litter $v & done
wait`

// A powerCut is the state of TestPowerCut.
type powerCut struct {
	*volumeRoom
	rng   *rand.Rand
	disks map[string]*cutDisk
	files map[string]string
	dirs  []string
	acked map[string]int64
}

// TestPowerCut cuts the power of a host in which a guest writes: QEMU is
// killed, and the disks below the volumes lose what was not flushed, or any part
// of it. The next guest replays the journals; each value whose fsync had
// returned is there, and the file systems are clean. On a disk that ignores
// flushes values are missing: the test can fail.
func TestPowerCut(t *testing.T) {
	room := newVolumeRoom(t)
	if *powerSeed == 0 {
		*powerSeed = uint64(time.Now().UnixNano())
	}
	t.Logf("-power-seed %d", *powerSeed)
	p := &powerCut{
		volumeRoom: room, rng: rand.New(rand.NewPCG(*powerSeed, 1)),
		disks: map[string]*cutDisk{}, files: map[string]string{}, acked: map[string]int64{},
	}
	p.command = []string{"sh", "-c", powerCutScript}
	for _, v := range powerCutVolumes {
		id, dir := p.claim(t, v.name, "plain", 320<<20, vmpod.DiskRecord{FSType: v.fsType})
		p.dirs = append(p.dirs, dir)
		p.files[v.name] = p.fileOf(t, id)
		p.disks[v.name] = newCutDisk(t, p.files[v.name])
	}
	for i := range *powerCuts {
		p.life(t, uint32(i))
	}
	p.lastLife(t, uint32(*powerCuts))
}

// fileOf is where a volume lies.
func (p *powerCut) fileOf(t *testing.T, id string) string {
	t.Helper()
	h := storage.Holder{VM: "nobody", Host: "node-1"}
	a, err := p.volumeRoom.disks.Attach(t.Context(), id, h, storage.AttachOptions{})
	if err == nil {
		err = p.volumeRoom.disks.Detach(t.Context(), id, h)
	}
	if err != nil {
		t.Fatal(err)
	}
	return a.Path
}

// said is the last value of a volume that a pod has said a word with, -1 for
// none.
func (p *powerCut) said(t *testing.T, attempt uint32, volume, word string) int64 {
	t.Helper()
	log, err := os.ReadFile(filepath.Join(podConfig(p.h.dir).LogDirectory, fmt.Sprintf("main/%d.log", attempt)))
	if err != nil {
		t.Fatal(err)
	}
	last := int64(-1)
	for line := range bytes.Lines(log) {
		_, text, _ := strings.Cut(string(line), " F ")
		var n int64
		if _, err := fmt.Sscanf(text, volume+" "+word+" %d\n", &n); err == nil {
			last = n
		}
	}
	return last
}

// awaitSaid waits until a pod has said more than n of each volume.
func (p *powerCut) awaitSaid(t *testing.T, attempt uint32, word string, more map[string]int64) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		all := true
		for volume, n := range more {
			all = all && p.said(t, attempt, volume, word) > n
		}
		if all {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("attempt %d does not say %q with more than %v", attempt, word, more)
		}
	}
}

// begins starts a pod and holds what it finds to what was acknowledged.
func (p *powerCut) begins(t *testing.T, attempt uint32) (sandbox, ctr string) {
	t.Helper()
	sandbox, ctr = p.pod(t, attempt, "", p.dirs...)
	p.awaitSaid(t, attempt, "begin", map[string]int64{"ext": -1, "xfs": -1, "liar": -1})
	for _, v := range powerCutVolumes {
		found := p.said(t, attempt, v.name, "begin")
		if v.name == "liar" {
			if attempt == 1 && found >= p.acked["liar"] {
				t.Errorf("of the disk that ignores flushes all of %d values are there: this test could not fail", found)
			}
			continue
		}
		if found < p.acked[v.name] || found > p.acked[v.name]+1 {
			t.Errorf("after cut %d volume %s has %d values, %d were acknowledged", attempt, v.name, found, p.acked[v.name])
		}
	}
	return sandbox, ctr
}

// life is a pod that ends with the power.
func (p *powerCut) life(t *testing.T, attempt uint32) {
	t.Helper()
	sandbox, _ := p.begins(t, attempt)
	at := map[string]int64{}
	for _, v := range powerCutVolumes {
		at[v.name] = p.said(t, attempt, v.name, "begin") + 3
	}
	p.awaitSaid(t, attempt, "wrote", at)
	if attempt == 0 {
		p.disks["liar"].lie()
		now := p.said(t, attempt, "liar", "wrote")
		p.awaitSaid(t, attempt, "wrote", map[string]int64{"liar": now + 3})
	}
	p.powerOff(t, attempt)
	p.s.remove(t, sandbox)
	for _, v := range powerCutVolumes {
		p.acked[v.name] = max(p.acked[v.name], p.said(t, attempt, v.name, "wrote"))
		lost, kept, flushes := p.disks[v.name].powerOn(t, p.rng)
		t.Logf("cut %d: %s: %d values acknowledged, %d flushes; of what was not flushed %d sectors are lost and %d kept", attempt+1, v.name, p.acked[v.name], flushes, lost, kept)
		if flushes == 0 {
			t.Errorf("volume %s was never flushed", v.name)
		}
	}
	if features, err := exec.CommandContext(t.Context(), "dumpe2fs", "-h", p.files["ext"]).Output(); err != nil || !bytes.Contains(features, []byte("needs_recovery")) {
		t.Errorf("there is no journal to be replayed after the cut: %v", err)
	}
}

// powerOff cuts all disks off, after any of the next writes to one of them, and
// ends the VM.
func (p *powerCut) powerOff(t *testing.T, attempt uint32) {
	t.Helper()
	m, err := p.h.driver.Open(t.Context(), vmpod.ID{PodUID: podUID, Attempt: attempt})
	if err != nil {
		t.Fatal(err)
	}
	st, err := m.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	tripped, by := make(chan struct{}), powerCutVolumes[p.rng.IntN(2)].name
	p.disks[by].cutAfter(1+p.rng.IntN(100), func() {
		for _, d := range p.disks {
			d.cut()
		}
		close(tripped)
	})
	select {
	case <-tripped:
	case <-time.After(time.Minute):
		t.Fatalf("volume %s is not written", by)
	}
	if err := syscall.Kill(st.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// lastLife reads everything, ends in order, and leaves clean file systems.
func (p *powerCut) lastLife(t *testing.T, attempt uint32) {
	t.Helper()
	sandbox, ctr := p.begins(t, attempt)
	if _, err := p.s.rt.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: ctr}); err != nil {
		t.Fatal(err)
	}
	p.s.remove(t, sandbox)
	for name, d := range p.disks {
		if err := d.unmount(); err != nil {
			t.Fatal(err)
		}
		tool := []string{"e2fsck", "-fn"}
		if name == "xfs" {
			tool = []string{"xfs_repair", "-nf"}
		}
		if out, err := exec.CommandContext(t.Context(), tool[0], append(tool[1:], p.files[name])...).CombinedOutput(); err != nil {
			t.Errorf("%v of volume %s: %v\n%s", tool, name, err, out)
		}
	}
	p.everyValue(t)
}

// everyValue looks at the values themselves, which lie in the ext4 volume's
// file: debugfs reads them without a mount.
func (p *powerCut) everyValue(t *testing.T) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "debugfs", "-R", "cat /log", p.files["ext"]).Output()
	if err != nil {
		t.Fatal(err)
	}
	n := int64(0)
	for line := range bytes.Lines(out) {
		n++
		if want := fmt.Sprintf("%015d\n", n); string(line) != want {
			t.Fatalf("value %d of volume ext is %q", n, line)
		}
	}
	if n < p.acked["ext"] {
		t.Errorf("volume ext has %d values, %d were acknowledged", n, p.acked["ext"])
	}
}
