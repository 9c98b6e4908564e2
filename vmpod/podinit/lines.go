package podinit

import (
	"bytes"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// A lineSplitter cuts one output stream into log records: one a line, several
// where a line is longer than agentapi.MaxLine.
type lineSplitter struct {
	stream agentapi.LogRecord_Stream
	held   []byte // a line whose end has not come yet
}

// split returns the records that p completes, stamped with the time it was
// read.
func (l *lineSplitter) split(p []byte, now int64) []*agentapi.LogRecord {
	var out []*agentapi.LogRecord
	for len(p) > 0 {
		room := agentapi.MaxLine - len(l.held)
		i := bytes.IndexByte(p[:min(len(p), room+1)], '\n')
		switch {
		case i >= 0:
			out = append(out, l.record(p[:i], now, false))
			p = p[i+1:]
		case len(p) > room:
			out = append(out, l.record(p[:room], now, true))
			p = p[room:]
		default:
			l.held = append(l.held, p...)
			p = nil
		}
	}
	return out
}

// rest returns the last line if it was not ended, nil if there is none.
func (l *lineSplitter) rest(now int64) []*agentapi.LogRecord {
	if len(l.held) == 0 {
		return nil
	}
	return []*agentapi.LogRecord{l.record(nil, now, false)}
}

func (l *lineSplitter) record(tail []byte, now int64, partial bool) *agentapi.LogRecord {
	line := append(l.held, tail...)
	l.held = nil
	return &agentapi.LogRecord{TimeNs: now, Stream: l.stream, Partial: partial, Line: line}
}
