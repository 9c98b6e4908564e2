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
	head [muxHeader]byte
	n    int    // of head
	left uint32 // of the frame's body
	err  error
}

const (
	muxTypePing   = 2
	muxTypeGoAway = 3
	muxFlagSYN    = 1
	muxWindow     = 256 << 10 // yamux's MaxStreamWindowSize, as muxConfig leaves it
)

// feed looks at what the guest sent; the first error stays.
func (g *muxGuard) feed(p []byte) error {
	for len(p) > 0 && g.err == nil {
		if g.left > 0 {
			n := min(uint32(len(p)), g.left)
			g.left -= n
			p = p[n:]
			continue
		}
		n := copy(g.head[g.n:], p)
		g.n += n
		p = p[n:]
		if g.n < muxHeader {
			break
		}
		g.n = 0
		g.err = g.check()
	}
	return g.err
}

func (g *muxGuard) check() error {
	typ, flags, length := g.head[1], binary.BigEndian.Uint16(g.head[2:]), binary.BigEndian.Uint32(g.head[8:])
	switch {
	case g.head[0] != 0 || typ > muxTypeGoAway:
		return misbehaved("a frame of version %d and type %d", g.head[0], typ)
	case typ == muxTypePing:
		return misbehaved("a ping, for which nobody asked")
	case flags&muxFlagSYN != 0:
		return misbehaved("it opened a stream")
	case typ == muxTypeData && length > muxWindow:
		return misbehaved("a frame of %d bytes", length)
	case typ == muxTypeData:
		g.left = length
	}
	return nil
}
