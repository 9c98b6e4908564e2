package agentapi

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
)

const (
	// MaxMessage caps a length-prefixed message: headers, replies, records.
	MaxMessage = 64 << 10
	// MaxChunk caps one chunk of a byte stream.
	MaxChunk = 64 << 10
	// MaxLine is the longest LogRecord.line; longer lines are split.
	MaxLine = 16 << 10
	// MaxCopyOut is the most that one COPY_OUT carries.
	MaxCopyOut = 16 << 20
)

// WriteMessage writes m with its length before it, in one Write.
func WriteMessage(w io.Writer, m proto.Message) error {
	b, err := proto.MarshalOptions{}.MarshalAppend(make([]byte, 4, 512), m)
	if err != nil {
		return err
	}
	n := len(b) - 4
	if n > MaxMessage {
		return fmt.Errorf("agent message %s of %d bytes is over the limit of %d: %w", m.ProtoReflect().Descriptor().Name(), n, MaxMessage, errdefs.ErrInvalidArgument)
	}
	binary.BigEndian.PutUint32(b, uint32(n))
	_, err = w.Write(b)
	return err
}

// ReadMessage reads what WriteMessage wrote. io.EOF means that nothing was
// there; a message cut short is io.ErrUnexpectedEOF, an oversized or
// malformed one ErrInvalidArgument.
func ReadMessage(r io.Reader, m proto.Message) error {
	var h [4]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(h[:])
	if n > MaxMessage {
		return fmt.Errorf("agent message %s claims %d bytes, over the limit of %d: %w", m.ProtoReflect().Descriptor().Name(), n, MaxMessage, errdefs.ErrInvalidArgument)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	if err := proto.Unmarshal(b, m); err != nil {
		return fmt.Errorf("agent message %s is malformed (%v): %w", m.ProtoReflect().Descriptor().Name(), err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// A chunkWriter sends a byte stream in chunks.
type chunkWriter struct {
	w    io.Writer
	mu   sync.Mutex
	buf  []byte
	done bool
}

// Write sends p, split where it is longer than a chunk may be.
func (c *chunkWriter) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done {
		return 0, io.ErrClosedPipe
	}
	total := 0
	for len(p) > 0 {
		n := min(len(p), MaxChunk)
		c.buf = binary.BigEndian.AppendUint32(c.buf[:0], uint32(n))
		c.buf = append(c.buf, p[:n]...)
		if _, err := c.w.Write(c.buf); err != nil {
			return total, err
		}
		total += n
		p = p[n:]
	}
	return total, nil
}

// end sends the orderly end, once.
func (c *chunkWriter) end() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done {
		return nil
	}
	c.done = true
	_, err := c.w.Write(make([]byte, 4))
	return err
}

// A chunkReader is the other end of a chunkWriter: io.EOF is the orderly end,
// io.ErrUnexpectedEOF a stream that was cut.
type chunkReader struct {
	r    io.Reader
	left int
	done bool
}

func (c *chunkReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for c.left == 0 {
		if c.done {
			return 0, io.EOF
		}
		var h [4]byte
		if _, err := io.ReadFull(c.r, h[:]); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
		n := binary.BigEndian.Uint32(h[:])
		if n > MaxChunk {
			return 0, fmt.Errorf("agent stream: a chunk claims %d bytes, over the limit of %d: %w", n, MaxChunk, errdefs.ErrInvalidArgument)
		}
		c.left, c.done = int(n), n == 0
	}
	n, err := c.r.Read(p[:min(len(p), c.left)])
	c.left -= n
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
		if n > 0 {
			err = nil
		}
	}
	return n, err
}

// A frameJoiner joins what yamux writes in two: a data frame's header and its
// body. Each write is an interrupt on the other side.
type frameJoiner struct{ held []byte }

const (
	muxHeader   = 12 // yamux: version, type, flags (2), stream (4), length (4)
	muxTypeData = 0
)

// join returns what is to be written now; empty means that p was kept back,
// because its body is what yamux writes next.
func (j *frameJoiner) join(p []byte) []byte {
	if len(j.held) == 0 {
		if len(p) == muxHeader && p[1] == muxTypeData && binary.BigEndian.Uint32(p[8:]) > 0 {
			j.held = append(j.held, p...)
			return nil
		}
		return p
	}
	out := append(j.held, p...)
	j.held = out[:0]
	return out
}
