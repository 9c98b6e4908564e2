package agentapi

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/containerd/errdefs"
	"github.com/hashicorp/yamux"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// A Stream is one typed stream of a session: a net.Conn whose directions end
// separately. Read returns io.EOF only at the orderly end; a stream that was
// cut, by the peer or with its session, gives an error of class
// ErrUnavailable.
type Stream struct {
	raw   *yamux.Stream
	in    chunkReader
	out   chunkWriter
	cause func() error // why the session ended, nil if it has not
	fail  func(error)  // host side: ends the session

	accepted bool          // guest side
	records  *bufio.Writer // guest side, what Send keeps
	incoming *bufio.Reader // host side, what receive has not taken yet
}

func newStream(raw *yamux.Stream, cause func() error) *Stream {
	s := &Stream{raw: raw, cause: cause}
	s.in.r, s.out.w = raw, raw
	return s
}

// Read reads what the peer wrote.
func (s *Stream) Read(p []byte) (int, error) {
	n, err := s.in.Read(p)
	return n, s.explain(s.judge(err))
}

// Write sends p.
func (s *Stream) Write(p []byte) (int, error) {
	n, err := s.out.Write(p)
	return n, s.explain(err)
}

// CloseWrite ends the direction to the peer, which then reads io.EOF; reading
// goes on.
func (s *Stream) CloseWrite() error { return s.explain(s.out.end()) }

// Close gives the stream up in both directions. The peer sees a direction
// that was not ended by CloseWrite as cut.
func (s *Stream) Close() error { return s.raw.Close() }

// LocalAddr and RemoteAddr name the session's ends, for net.Conn's sake.
func (s *Stream) LocalAddr() net.Addr  { return s.raw.LocalAddr() }
func (s *Stream) RemoteAddr() net.Addr { return s.raw.RemoteAddr() }

// SetDeadline bounds reads and writes.
func (s *Stream) SetDeadline(t time.Time) error { return s.raw.SetDeadline(t) }

// SetReadDeadline bounds reads.
func (s *Stream) SetReadDeadline(t time.Time) error { return s.raw.SetReadDeadline(t) }

// SetWriteDeadline bounds writes.
func (s *Stream) SetWriteDeadline(t time.Time) error { return s.raw.SetWriteDeadline(t) }

// Accept tells the host that data follows (guest side, once, first).
func (s *Stream) Accept() error {
	s.accepted = true
	return WriteMessage(s.raw, &StreamReply{})
}

// Finish tells the host how the work of the stream ended (guest side).
func (s *Stream) Finish(err error) error {
	r := &StreamReply{}
	if err != nil {
		r.Code, r.Message = int32(codeOf(err)), clip(err.Error(), maxErrorText)
	}
	return WriteMessage(s.raw, r)
}

// Send takes one record (guest side, LOGS and EXITS). It may wait for more
// until Flush, so that many small records travel in one frame.
func (s *Stream) Send(m proto.Message) error {
	return s.explain(WriteMessage(s.buffered(), m))
}

// SendFrames is Send for records that are encoded already, each behind its
// length as WriteMessage writes it.
func (s *Stream) SendFrames(b []byte) error {
	_, err := s.buffered().Write(b)
	return s.explain(err)
}

func (s *Stream) buffered() *bufio.Writer {
	if s.records == nil {
		s.records = bufio.NewWriterSize(s.raw, MaxChunk)
	}
	return s.records
}

// Flush sends what Send has kept.
func (s *Stream) Flush() error {
	if s.records == nil {
		return nil
	}
	return s.explain(s.records.Flush())
}

// Gone is closed when the host has given the stream up. It reads from the
// stream, so it is for streams on which the host sends nothing.
func (s *Stream) Gone() <-chan struct{} {
	c := make(chan struct{})
	go func() {
		defer close(c)
		io.Copy(io.Discard, s.raw)
	}()
	return c
}

// receive reads one record (host side).
func (s *Stream) receive(m proto.Message) error {
	if s.incoming == nil {
		s.incoming = bufio.NewReaderSize(s.raw, 32<<10)
	}
	err := ReadMessage(s.incoming, m)
	if err == io.EOF {
		if c := s.cause(); c != nil {
			return errBroken(c)
		}
		return io.EOF
	}
	return s.explain(s.judge(err))
}

// judge ends the session over a message that no agent sends (host side).
func (s *Stream) judge(err error) error {
	if s.fail != nil && errdefs.IsInvalidArgument(err) {
		err = fmt.Errorf("%w: %w", ErrMisbehaved, err)
		s.fail(err)
	}
	return err
}

// reply reads a StreamReply and returns the error in it (host side).
func (s *Stream) reply() error {
	var r StreamReply
	if err := ReadMessage(s.raw, &r); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return s.explain(s.judge(err))
	}
	if r.Code != 0 {
		return fromCode(codes.Code(uint32(r.Code)), r.Message)
	}
	return nil
}

// explain turns the many ways in which yamux says "gone" into one.
func (s *Stream) explain(err error) error {
	switch {
	case err == nil, err == io.EOF:
		return err
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, yamux.ErrStreamClosed),
		errors.Is(err, yamux.ErrConnectionReset), errors.Is(err, yamux.ErrSessionShutdown):
		if c := s.cause(); c != nil {
			return errBroken(c)
		}
		return errBroken(errors.New("the stream was cut"))
	}
	if c := s.cause(); c != nil { // with the words of the channel below
		return errBroken(c)
	}
	return err
}
