package agentapi

import (
	"encoding/binary"
	"net"
	"sync"
)

// rpcGuard stands between the ttrpc client and the guest. The client trusts
// its server: it discards messages of any size, and logs every answer that
// nobody waits for. The guard ends the session instead, at the first message
// over ttrpc's own limit, of a wrong kind, or for a call that was not made or
// was answered before.
type rpcGuard struct {
	net.Conn
	fail func(error)

	mu   sync.Mutex
	open map[uint32]bool // calls without an answer

	out, in rpcFrames
}

const (
	rpcHeader   = 10      // ttrpc: length, stream, type, flags
	rpcMax      = 4 << 20 // ttrpc's messageLengthMax
	rpcRequest  = 1
	rpcResponse = 2
)

// rpcFrames follows ttrpc's framing in a byte stream.
type rpcFrames struct {
	head [rpcHeader]byte
	n    int    // of head
	left uint32 // of the payload
}

// feed calls each with every header that ends in p.
func (f *rpcFrames) feed(p []byte, each func(length, stream uint32, kind byte) error) error {
	for len(p) > 0 {
		if f.left > 0 {
			n := min(uint32(len(p)), f.left)
			f.left -= n
			p = p[n:]
			continue
		}
		n := copy(f.head[f.n:], p)
		f.n += n
		p = p[n:]
		if f.n < rpcHeader {
			return nil
		}
		f.n = 0
		f.left = binary.BigEndian.Uint32(f.head[:4])
		if err := each(f.left, binary.BigEndian.Uint32(f.head[4:8]), f.head[8]); err != nil {
			return err
		}
	}
	return nil
}

// Write is called by one goroutine at a time (ttrpc's send lock).
func (g *rpcGuard) Write(p []byte) (int, error) {
	_ = g.out.feed(p, func(_, stream uint32, kind byte) error {
		if kind == rpcRequest {
			g.mu.Lock()
			if g.open == nil {
				g.open = make(map[uint32]bool)
			}
			g.open[stream] = true
			g.mu.Unlock()
		}
		return nil
	})
	return g.Conn.Write(p)
}

func (g *rpcGuard) Read(p []byte) (int, error) {
	n, err := g.Conn.Read(p)
	if bad := g.in.feed(p[:n], g.check); bad != nil {
		g.fail(bad)
		return 0, bad
	}
	return n, err
}

func (g *rpcGuard) check(length, stream uint32, kind byte) error {
	if length > rpcMax {
		return misbehaved("a message of %d bytes", length)
	}
	if kind != rpcResponse {
		return misbehaved("a message that is not an answer")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.open[stream] {
		return misbehaved("an answer to what was not asked")
	}
	delete(g.open, stream)
	return nil
}
