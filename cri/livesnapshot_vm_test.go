package cri

import (
	"bytes"
	"fmt"
	"io/fs"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
)

// liveScript writes to each volume numbered values with fsync, saying each when
// that has returned, and other files without. A volume that begins as another has
// that one's values.
const liveScript = `count() {
  n=0; [ ! -e /$1/log ] || n=$(( $(wc -c < /$1/log) / 16 ))
  echo "$1 begin $n"
  while n=$((n+1)); printf '%015d\n' $n | dd of=/$1/log oflag=append conv=notrunc,fsync bs=16 2> /dev/null; do echo "$1 wrote $n"; done
}
litter() {
  while i=$((i+1)); do
    echo "$i and more" > /$1/litter-$((i % 40)); : > /$1/empty-$((i % 7)); rm -f /$1/empty-$((i % 5))
    dd if=/dev/urandom of=/$1/direct bs=4096 count=4 seek=$((i % 900)) conv=notrunc
  done 2> /dev/null
}
for v in ext xfs sealed of-ext of-xfs of-sealed; do [ ! -d /$v ] || { count $v & litter $v & }; done
wait`

// TestSnapshotsOfVolumesInUse takes snapshots and clones of volumes to which a
// guest writes, where files share no blocks. Each has every value whose fsync had
// returned before, in order, and a file system that is clean once its journal was
// replayed.
func TestSnapshotsOfVolumesInUse(t *testing.T) {
	room := newVolumeRoom(t)
	p := &powerCut{volumeRoom: room}
	p.command = []string{"sh", "-c", liveScript}
	volumes := []struct{ name, policy, fsType string }{{"ext", "plain", "ext4"}, {"xfs", "plain", "xfs"}, {"sealed", "sealed", "ext4"}}
	ids, more := map[string]string{}, map[string]int64{}
	var dirs []string
	for _, v := range volumes {
		id, dir := p.claim(t, v.name, v.policy, 320<<20, vmpod.DiskRecord{FSType: v.fsType})
		ids[v.name], more[v.name], dirs = id, 5, append(dirs, dir)
	}
	sandbox, _ := p.pod(t, 0, "", dirs...)
	p.awaitSaid(t, 0, "wrote", more)

	acked, made := map[string]int64{}, map[string]string{}
	dirs = nil
	for _, v := range volumes {
		source := &storage.Source{VolumeID: ids[v.name]} // a clone
		acked[v.name] = p.said(t, 0, v.name, "wrote")
		if v.name != "xfs" {
			s, err := p.volumeRoom.disks.Snapshot(t.Context(), ids[v.name], "snap-"+v.name, nil)
			if err != nil {
				t.Fatal(err)
			}
			source = &storage.Source{SnapshotID: s.ID}
		}
		w, err := p.volumeRoom.disks.Create(t.Context(), storage.Claim{Name: "of-" + v.name, Policy: v.policy, Source: source})
		if err != nil {
			t.Fatal(err)
		}
		if w.Bytes != 320<<20 {
			t.Errorf("what begins as %s has %d bytes", v.name, w.Bytes)
		}
		made["of-"+v.name] = w.ID
		dirs = append(dirs, p.publish(t, "of-"+v.name, w.ID, vmpod.DiskRecord{FSType: v.fsType}))
	}
	more = map[string]int64{}
	for _, v := range volumes {
		more[v.name] = p.said(t, 0, v.name, "wrote") + 3
	}
	p.awaitSaid(t, 0, "wrote", more) // it goes on
	file := p.fileOf(t, made["of-ext"])
	if head, err := exec.CommandContext(t.Context(), "dumpe2fs", "-h", file).Output(); err != nil || !bytes.Contains(head, []byte("needs_recovery")) {
		t.Errorf("there is no journal to be replayed in the snapshot of a volume in use: %v", err)
	}

	next, ctr := p.pod(t, 1, "", dirs...)
	p.awaitSaid(t, 1, "begin", map[string]int64{"of-ext": -1, "of-xfs": -1, "of-sealed": -1})
	for _, v := range volumes {
		has, last := p.said(t, 1, "of-"+v.name, "begin"), p.said(t, 0, v.name, "wrote")
		t.Logf("%s: %d values acknowledged before, %d in the copy, %d when it was mounted", v.name, acked[v.name], has, last)
		if has < acked[v.name] || has >= last {
			t.Errorf("the copy of %s has %d values, %d were acknowledged before and %d later", v.name, has, acked[v.name], last)
		}
		wrong := p.s.exec(t, ctr, "sh", "-c", fmt.Sprintf(`awk '($1 "") != sprintf("%%015d", NR) "" { print NR ": " $0; exit }' /of-%s/log`, v.name))
		if wrong != "" {
			t.Errorf("line %s of the copy of %s", wrong, v.name)
		}
	}
	if _, err := p.s.rt.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: ctr}); err != nil {
		t.Fatal(err)
	}
	p.s.remove(t, next)
	p.s.remove(t, sandbox)
	for _, tool := range [][]string{{"e2fsck", "-fn", file}, {"xfs_repair", "-nf", p.fileOf(t, made["of-xfs"])}} {
		if out, err := exec.CommandContext(t.Context(), tool[0], tool[1:]...).CombinedOutput(); err != nil {
			t.Errorf("%v: %v\n%s", tool, err, out)
		}
	}
	if left := p.h.left(t); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// TestVMEndsWhileItCopies kills a VM that copies its volume. Nothing of that is
// left, and asked for again the snapshot is taken of what the VM has left.
func TestVMEndsWhileItCopies(t *testing.T) {
	room := newVolumeRoom(t)
	id, dir := room.claim(t, "data", "slow", 64<<20, vmpod.DiskRecord{})
	sandbox, ctr := room.pod(t, 0, "", dir)
	room.s.exec(t, ctr, "sh", "-c", "dd if=/dev/urandom of=/data/junk bs=1M count=12 conv=fsync 2> /dev/null; echo kept > /data/note; busybox sync")
	before := filesOf(t, room)

	failed := make(chan error, 1)
	go func() {
		_, err := room.disks.Snapshot(t.Context(), id, "snap", nil)
		failed <- err
	}()
	for end := time.Now().Add(time.Minute); len(filesOf(t, room)) < len(before)+2; time.Sleep(10 * time.Millisecond) { // a record and a file
		if time.Now().After(end) {
			t.Fatal("no copy begins")
		}
	}
	time.Sleep(time.Second) // of the six that it takes
	m, err := room.h.driver.Open(t.Context(), vmpod.ID{PodUID: podUID})
	if err != nil {
		t.Fatal(err)
	}
	st, err := m.Status(t.Context())
	if err != nil || syscall.Kill(st.PID, syscall.SIGKILL) != nil {
		t.Fatal(err)
	}
	if err := <-failed; !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "ended") {
		t.Errorf("the snapshot whose VM was killed: %v", err)
	}
	if after := filesOf(t, room); !slices.Equal(after, before) {
		t.Errorf("files were %q, are %q", before, after)
	}
	if _, err := room.disks.Snapshot(t.Context(), id, "snap", nil); !errdefs.IsUnavailable(err) && !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a snapshot before the sandbox was stopped: %v", err)
	}
	room.s.remove(t, sandbox)
	s, err := room.disks.Snapshot(t.Context(), id, "snap", nil)
	if err != nil {
		t.Fatal(err)
	}
	w, err := room.disks.Create(t.Context(), storage.Claim{Name: "restored", Policy: "slow", Source: &storage.Source{SnapshotID: s.ID}})
	if err != nil {
		t.Fatal(err)
	}
	restored := room.publish(t, "restored", w.ID, vmpod.DiskRecord{})
	sandbox, ctr = room.pod(t, 1, "", restored)
	if out := room.s.exec(t, ctr, "sh", "-c", "cat /restored/note; wc -c < /restored/junk"); out != "kept\n12582912\n" {
		t.Errorf("the restored volume has %q", out)
	}
	room.s.remove(t, sandbox)
}

// filesOf are all files of a room's datastore, without those that are about to be
// renamed.
func filesOf(t *testing.T, r *volumeRoom) (names []string) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(r.h.dir, "datastore"), func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() && filepath.Ext(path) != ".new" {
			names = append(names, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}
