package agentapi

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// ErrMisbehaved is in the error of a session that ended because the guest
// broke the protocol. An honest agent never does, whatever the load and
// whatever became of earlier hosts.
var ErrMisbehaved = errors.New("the guest's agent broke the protocol")

func misbehaved(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrMisbehaved, fmt.Sprintf(format, args...))
}

// A muxGuard stands between yamux and the guest. yamux trusts its peer: it
// starts a goroutine for every ping, which stays as long as the peer does not
// read, and reads on behind frames for streams that never were.
type muxGuard struct {
	in  frameScanner
	err error
}

const (
	muxTypePing   = 2
	muxTypeGoAway = 3
	muxFlagSYN    = 1
	muxWindow     = 256 << 10 // yamux's MaxStreamWindowSize, as muxConfig leaves it
)

// feed looks at what the guest sent; the first error stays.
func (g *muxGuard) feed(p []byte) error {
	if g.err == nil {
		g.err = g.in.feed(p, muxHeader, checkMux)
	}
	return g.err
}

func checkMux(head []byte) (body uint32, err error) {
	typ, flags, length := head[1], binary.BigEndian.Uint16(head[2:]), binary.BigEndian.Uint32(head[8:])
	switch {
	case head[0] != 0 || typ > muxTypeGoAway:
		return 0, misbehaved("a frame of version %d and type %d", head[0], typ)
	case typ == muxTypePing:
		return 0, misbehaved("a ping, for which nobody asked")
	case flags&muxFlagSYN != 0:
		return 0, misbehaved("it opened a stream")
	case typ == muxTypeData && length > muxWindow:
		return 0, misbehaved("a frame of %d bytes", length)
	case typ == muxTypeData:
		return length, nil
	}
	return 0, nil
}
