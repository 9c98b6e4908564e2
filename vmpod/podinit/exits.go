package podinit

import (
	"sync"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// maxExits is how many unacknowledged exits are kept. Beyond it those of
// execs go first (whoever ran one has waited for it), then the oldest.
const maxExits = 4096

// An exitJournal counts ended processes from 1.
type exitJournal struct {
	mu      sync.Mutex
	records []*agentapi.ExitRecord
	next    uint64
	changed chan struct{}
}

func newExitJournal() *exitJournal {
	return &exitJournal{next: 1, changed: make(chan struct{})}
}

func (j *exitJournal) append(rec *agentapi.ExitRecord) {
	j.mu.Lock()
	defer j.mu.Unlock()
	rec.Offset = j.next
	j.next++
	j.records = append(j.records, rec)
	if len(j.records) > maxExits {
		victim := 0
		for i, r := range j.records {
			if r.ExecId != "" {
				victim = i
				break
			}
		}
		j.records = append(j.records[:victim], j.records[victim+1:]...)
	}
	close(j.changed)
	j.changed = make(chan struct{})
}

// ack drops the records up to an offset.
func (j *exitJournal) ack(offset uint64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := 0
	for n < len(j.records) && j.records[n].Offset <= offset {
		n++
	}
	j.records = append([]*agentapi.ExitRecord(nil), j.records[n:]...)
}

// since returns the records from an offset on, and a channel that is closed
// when there are more.
func (j *exitJournal) since(from uint64) ([]*agentapi.ExitRecord, <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := 0
	for n < len(j.records) && j.records[n].Offset < from {
		n++
	}
	return append([]*agentapi.ExitRecord(nil), j.records[n:]...), j.changed
}

// follow calls each with every record from an offset on, and idle before it
// waits for more, until stop is closed.
func (j *exitJournal) follow(from uint64, stop <-chan struct{}, each func(*agentapi.ExitRecord) error, idle func() error) error {
	for {
		records, more := j.since(from)
		for _, rec := range records {
			if err := each(rec); err != nil {
				return err
			}
			from = rec.Offset + 1
		}
		if err := idle(); err != nil {
			return err
		}
		select {
		case <-more:
		case <-stop:
			return nil
		}
	}
}
