package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/vmpod"
)

// A volume is copied by QEMU's job blockdev-backup, which has what the guest is
// about to overwrite copied first. docs/decisions/0021-copies-of-volumes-in-use.md
// has the reasons for what is here.

var _ vmpod.DiskCopier = (*Machine)(nil)

// Names of what a copy has inside QEMU: its job, the node that it writes to, the
// bitmap of what it reads, and its descriptors; and the node that a bitmap is
// read from.
func copyName(id string) string    { return copyPrefix + id }
func extentsName(id string) string { return "extents-" + id }

const copyPrefix = "copy-"

const (
	// copyPoll is how often a copy is looked at.
	copyPoll = 500 * time.Millisecond
	// copyWorkers and copyChunk (bytes) are what a copy has in flight: little, so
	// that the guest's own requests wait for little.
	copyWorkers = 1
	copyChunk   = 1 << 20
)

// A diskCopy is one that this process has under way.
type diskCopy struct {
	cancel context.CancelCauseFunc
	done   chan struct{}
}

var errUnplugged = fmt.Errorf("the disk is unplugged: %w", errdefs.ErrUnavailable)

// CopyDisk implements vmpod.DiskCopier.
func (m *Machine) CopyDisk(ctx context.Context, diskID string, to *os.File, progress func(done, total int64)) error {
	if err := m.copyDisk(ctx, diskID, to, progress); err != nil {
		return fmt.Errorf("pod VM %s: copy disk %q: %w", m.id, diskID, err)
	}
	return nil
}

func (m *Machine) copyDisk(ctx context.Context, diskID string, to *os.File, progress func(done, total int64)) error {
	ctx, done, err := m.beginCopy(ctx, diskID)
	if err != nil {
		return err
	}
	defer done()
	q, err := m.monitor(ctx)
	if err != nil {
		return err
	}
	if err = m.startCopy(ctx, q, diskID, to); err == nil {
		failpoint.Hit(failpoint.DiskCopyStarted)
		err = m.awaitCopy(ctx, q, diskID, to, progress)
	}
	if cerr := m.clearCopy(ctx, diskID); cerr != nil && !m.off() {
		m.log.Error("what a copy of a volume has in QEMU cannot be taken back yet", "disk", diskID, "err", cerr)
		err = errors.Join(err, cerr)
	}
	failpoint.Hit(failpoint.DiskCopyEnded)
	switch {
	case err == nil:
		return nil
	case m.off():
		return fmt.Errorf("the VM has ended before the copy was whole: %w", errdefs.ErrUnavailable)
	case errors.Is(err, errQMPClosed):
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	return err
}

// clearCopy takes back what a copy of this process has in QEMU, also when its
// context is what ended, or the connection to the monitor.
func (m *Machine) clearCopy(ctx context.Context, diskID string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.d.cfg.Deadline)
	defer cancel()
	for {
		q, err := m.monitor(ctx)
		if err == nil {
			err = m.endCopy(ctx, q, diskID)
		}
		if !errors.Is(err, errQMPClosed) || m.off() {
			return err
		}
		select {
		case <-time.After(minReconnect):
		case <-ctx.Done():
			return err
		}
	}
}

// beginCopy says that a disk is being copied by this process, until done.
func (m *Machine) beginCopy(ctx context.Context, diskID string) (_ context.Context, done func(), err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.copies[diskID] != nil {
		return nil, nil, fmt.Errorf("it is being copied already: try again later: %w", errdefs.ErrUnavailable)
	}
	if m.copies == nil {
		m.copies = map[string]*diskCopy{}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	c := &diskCopy{cancel, make(chan struct{})}
	m.copies[diskID] = c
	return ctx, func() {
		cancel(nil)
		m.mu.Lock()
		delete(m.copies, diskID)
		m.mu.Unlock()
		close(c.done)
	}, nil
}

// copying returns the copy of a disk that is under way, nil if none is.
func (m *Machine) copying(diskID string) *diskCopy {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.copies[diskID]
}

// stopCopy ends a copy of a disk, if there is one, and waits until it has ended.
func (m *Machine) stopCopy(ctx context.Context, diskID string) error {
	c := m.copying(diskID)
	if c == nil {
		return nil
	}
	c.cancel(errUnplugged)
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("a copy of it does not end: %w", ctx.Err())
	}
}

// startCopy has QEMU begin to copy a disk. It returns when the instant of the
// copy has come.
func (m *Machine) startCopy(ctx context.Context, q *qmpConn, diskID string, to *os.File) error {
	m.plugging.Lock() // the disk stays, and stays as large
	defer m.plugging.Unlock()
	d, err := m.copiedDisk(diskID)
	if err != nil {
		return err
	}
	if err := m.endCopy(ctx, q, diskID); err != nil { // one that a killed process left
		return err
	}
	source, err := copySource(ctx, q, d)
	if err != nil {
		return err
	}
	size, err := nodeSize(ctx, q, source)
	if err != nil {
		return err
	}
	job := map[string]any{
		"job-id": copyName(diskID), "device": source, "target": copyName(diskID), "auto-dismiss": false,
		"on-source-error": "report", "on-target-error": "report",
		"x-perf": map[string]any{"max-workers": copyWorkers, "max-chunk": copyChunk},
		// Not more than the guest may have itself.
		"speed": d.Volume.BytesPerSecond,
	}
	if d.Format == "qcow2" {
		job["sync"] = "top"
	} else {
		if err := to.Truncate(size); err != nil {
			return err
		}
		job["sync"], job["bitmap"], job["bitmap-mode"] = "bitmap", copyName(diskID), "never"
	}
	if err := addCopyTarget(ctx, q, d, to); err != nil {
		return err
	}
	failpoint.Hit(failpoint.DiskCopyTarget)
	if d.Format != "qcow2" {
		if err := mapData(ctx, q, d, source, size); err != nil {
			return err
		}
	}
	failpoint.Hit(failpoint.DiskCopyMapped)
	err = q.run(ctx, "blockdev-backup", job, nil)
	var refused *qmpError
	if errors.As(err, &refused) && strings.Contains(refused.Desc, "x-perf") {
		delete(job, "x-perf") // it is not promised to stay
		err = q.run(ctx, "blockdev-backup", job, nil)
	}
	return err
}

// copiedDisk finds a disk that may be copied. The caller has plugging.
func (m *Machine) copiedDisk(diskID string) (vmpod.Disk, error) {
	for _, e := range m.table().Disks {
		switch {
		case e.ID != diskID:
		case e.Volume == nil:
			return e.Disk, fmt.Errorf("it is no volume: %w", errdefs.ErrInvalidArgument)
		case e.ReadOnly:
			return e.Disk, fmt.Errorf("it is read-only: its file can be copied as it is: %w", errdefs.ErrFailedPrecondition)
		default:
			return e.Disk, nil
		}
	}
	return vmpod.Disk{}, fmt.Errorf("there is none: %w", errdefs.ErrNotFound)
}

// copySource is the node with a volume's bytes as they are to be copied. It lies
// below a throttle, which is for the guest's requests; of luks it is what is on
// the host's disk.
func copySource(ctx context.Context, q *qmpConn, d vmpod.Disk) (string, error) {
	if d.Format == "luks" {
		return fileNode(ctx, q, d.ID)
	}
	if throttleLimits(*d.Volume) != nil {
		return formatName(d.ID), nil
	}
	return nodeName(d.ID), nil
}

// fileNode finds the node of a disk's only file, to which QEMU has given a name.
func fileNode(ctx context.Context, q *qmpConn, diskID string) (string, error) {
	set, ok, err := fdset(ctx, q, diskName(diskID))
	if err != nil {
		return "", err
	}
	var nodes []struct {
		Name   string `json:"node-name"`
		Driver string `json:"drv"`
		File   string `json:"file"`
	}
	if err := q.run(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &nodes); err != nil {
		return "", err
	}
	for _, n := range nodes {
		if ok && n.File == fdsetPath(set) && (n.Driver == "file" || n.Driver == "host_device") {
			return n.Name, nil
		}
	}
	return "", fmt.Errorf("QEMU has no node of its file: %w", errdefs.ErrNotFound)
}

// fdset finds the first set of descriptors of a name.
func fdset(ctx context.Context, q *qmpConn, opaque string) (set int, ok bool, err error) {
	sets, err := fdsets(ctx, q)
	for _, s := range sets {
		if s.opaque == opaque {
			return s.id, true, err
		}
	}
	return 0, false, err
}

// addCopyTarget gives QEMU the file that a copy is written to.
func addCopyTarget(ctx context.Context, q *qmpConn, d vmpod.Disk, to *os.File) error {
	var r struct {
		Set int `json:"fdset-id"`
	}
	if err := q.run(ctx, "add-fd", map[string]any{"opaque": copyName(d.ID)}, &r, to); err != nil {
		return err
	}
	cache := map[string]any{"direct": false, "no-flush": false}
	node := map[string]any{
		"driver": "file", "filename": fdsetPath(r.Set), "aio": "threads", "locking": "on",
		"cache": cache, "discard": "unmap", "detect-zeroes": "unmap",
	}
	if d.Format == "qcow2" {
		// What lies below it is not read: what is copied is above that.
		node = map[string]any{"driver": "qcow2", "file": node, "backing": nil, "cache": cache, "discard": "unmap"}
	}
	node["node-name"] = copyName(d.ID)
	return q.run(ctx, "blockdev-add", node, nil)
}

// mapData gives source a bitmap of what is to be copied: all that has data, or
// gets some until the copy begins. Without it QEMU would write zeroes where there
// are holes, for which the host reserves blocks.
func mapData(ctx context.Context, q *qmpConn, d vmpod.Disk, source string, size int64) error {
	f, err := os.Open(d.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	bitmap := map[string]any{"node": source, "name": copyName(d.ID), "granularity": copyGrain}
	if err := q.run(ctx, "block-dirty-bitmap-add", bitmap, nil); err != nil {
		return err
	}
	// From here on it has what the guest writes; what it has written is in the file.
	extents, err := extentMap(f, size)
	if err != nil {
		return err
	}
	defer extents.Close()
	var r struct {
		Set int `json:"fdset-id"`
	}
	if err := q.run(ctx, "add-fd", map[string]any{"opaque": extentsName(d.ID)}, &r, extents); err != nil {
		return err
	}
	node := map[string]any{
		"driver": "qcow2", "node-name": extentsName(d.ID), "read-only": true,
		"file": map[string]any{"driver": "file", "filename": fdsetPath(r.Set), "read-only": true},
	}
	if err := q.run(ctx, "blockdev-add", node, nil); err != nil {
		return err
	}
	err = q.run(ctx, "block-dirty-bitmap-merge", map[string]any{
		"node": source, "target": copyName(d.ID), "bitmaps": []any{map[string]any{"node": extentsName(d.ID), "name": mapName}},
	}, nil)
	if err != nil {
		return err
	}
	if err := q.run(ctx, "blockdev-del", map[string]any{"node-name": extentsName(d.ID)}, nil); err != nil {
		return err
	}
	return dropFDs(ctx, q, extentsName(d.ID))
}

// A jobInfo is what QEMU says of a job.
type jobInfo struct {
	ID     string `json:"id"`
	Status string `json:"status"`
	Done   int64  `json:"current-progress"`
	Total  int64  `json:"total-progress"`
	Error  string `json:"error"`
}

// concluded is the status of a job that waits to be forgotten.
const concluded = "concluded"

// findJob asks for a job; nil if there is none of that name.
func findJob(ctx context.Context, q *qmpConn, name string) (*jobInfo, error) {
	var jobs []jobInfo
	if err := q.run(ctx, "query-jobs", nil, &jobs); err != nil {
		return nil, err
	}
	for i := range jobs {
		if jobs[i].ID == name {
			return &jobs[i], nil
		}
	}
	return nil, nil
}

// awaitCopy returns when a copy is whole, or is not to become so.
func (m *Machine) awaitCopy(ctx context.Context, q *qmpConn, diskID string, to *os.File, progress func(done, total int64)) error {
	events, unwatch := q.watch("JOB_STATUS_CHANGE")
	defer unwatch()
	tick := time.NewTicker(copyPoll)
	defer tick.Stop()
	for {
		j, err := findJob(ctx, q, copyName(diskID))
		switch {
		case err != nil:
			return err
		case j == nil:
			return fmt.Errorf("somebody else has ended the copy: %w", errdefs.ErrUnavailable)
		case j.Status == concluded && j.Error != "":
			return copyError(j.Error)
		case j.Status == concluded:
			return nil
		}
		if progress != nil {
			progress(j.Done, j.Total)
		}
		// What is copied goes to the host's disk as it comes, and not all at once
		// when the guest next syncs.
		_ = unix.SyncFileRange(int(to.Fd()), 0, 0, unix.SYNC_FILE_RANGE_WRITE)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-q.done:
			return errQMPClosed
		case <-events:
		case <-tick.C:
		}
	}
}

// copyError is what ended a job, in QEMU's words.
func copyError(words string) error {
	for _, full := range []error{unix.ENOSPC, unix.EDQUOT} {
		if strings.EqualFold(words, full.Error()) {
			return fmt.Errorf("%w: %w", full, errdefs.ErrResourceExhausted)
		}
	}
	return fmt.Errorf("QEMU gave the copy up: %s: %w", words, errdefs.ErrUnavailable)
}

// endCopy ends a disk's copy in QEMU, if there is one, and takes back all that
// was added for it.
func (m *Machine) endCopy(ctx context.Context, q *qmpConn, diskID string) error {
	if _, left, err := fdset(ctx, q, copyName(diskID)); err != nil || !left {
		return err // its descriptor comes first and goes last
	}
	if err := endJob(ctx, q, copyName(diskID)); err != nil {
		return err
	}
	if err := dropNode(ctx, q, extentsName(diskID)); err != nil {
		return err
	}
	for _, e := range m.table().Disks {
		if e.ID != diskID || e.Volume == nil || e.Format == "qcow2" {
			continue
		}
		if source, err := copySource(ctx, q, e.Disk); err == nil {
			_ = q.run(ctx, "block-dirty-bitmap-remove", map[string]any{"node": source, "name": copyName(diskID)}, nil) // may not have been added
		}
	}
	// A QEMU whose monitor nobody has forgets descriptors that no node uses: what
	// is left is known by this node's, so that it is the last to go.
	if err := dropNode(ctx, q, copyName(diskID)); err != nil {
		return err
	}
	return errors.Join(dropFDs(ctx, q, extentsName(diskID)), dropFDs(ctx, q, copyName(diskID)))
}

// dropNode removes a node; one that is not there succeeds.
func dropNode(ctx context.Context, q *qmpConn, name string) error {
	err := q.run(ctx, "blockdev-del", map[string]any{"node-name": name}, nil)
	var refused *qmpError
	if errors.As(err, &refused) && strings.Contains(refused.Desc, "Failed to find node") {
		return nil
	}
	return err
}

// endJob has a job cancelled and forgotten.
func endJob(ctx context.Context, q *qmpConn, name string) error {
	events, unwatch := q.watch("JOB_STATUS_CHANGE")
	defer unwatch()
	tick := time.NewTicker(copyPoll)
	defer tick.Stop()
	for asked := false; ; {
		j, err := findJob(ctx, q, name)
		switch {
		case err != nil || j == nil:
			return err
		case j.Status == concluded:
			return q.run(ctx, "job-dismiss", map[string]any{"id": name}, nil)
		case !asked:
			var refused *qmpError
			if err := q.run(ctx, "job-cancel", map[string]any{"id": name}, nil); err != nil && !errors.As(err, &refused) { // it may be ending by itself
				return err
			}
			asked = true
			continue
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("QEMU's job %s does not end: %w", name, ctx.Err())
		case <-q.done:
			return errQMPClosed
		case <-events:
		case <-tick.C:
		}
	}
}

// endLeftCopies ends the copies that a killed process left: nobody waits for
// them, and what they write to is erased.
func (m *Machine) endLeftCopies(ctx context.Context, q *qmpConn) error {
	sets, err := fdsets(ctx, q)
	if err != nil {
		return err
	}
	var errs []error
	for _, s := range sets {
		id, ok := strings.CutPrefix(s.opaque, copyPrefix)
		if !ok || m.copying(id) != nil {
			continue
		}
		_, done, err := m.beginCopy(ctx, id)
		if err != nil { // a new one has just begun, which ends what was left
			continue
		}
		m.log.Info("a copy of a volume that an earlier process began is ended", "disk", id)
		errs = append(errs, m.endCopy(ctx, q, id))
		done()
	}
	return errors.Join(errs...)
}
