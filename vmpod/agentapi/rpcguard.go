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

	out, in frameScanner
}

const (
	rpcHeader   = 10      // ttrpc: length, stream, type, flags
	rpcMax      = 4 << 20 // ttrpc's messageLengthMax
	rpcRequest  = 1
	rpcResponse = 2
)

// parseRPC reads a header; the length is the body's.
func parseRPC(head []byte) (length, stream uint32, kind byte) {
	return binary.BigEndian.Uint32(head), binary.BigEndian.Uint32(head[4:]), head[8]
}

// Write is called by one goroutine at a time (ttrpc's send lock).
func (g *rpcGuard) Write(p []byte) (int, error) {
	_ = g.out.feed(p, rpcHeader, func(head []byte) (uint32, error) {
		length, stream, kind := parseRPC(head)
		if kind == rpcRequest {
			g.mu.Lock()
			if g.open == nil {
				g.open = make(map[uint32]bool)
			}
			g.open[stream] = true
			g.mu.Unlock()
		}
		return length, nil
	})
	return g.Conn.Write(p)
}

func (g *rpcGuard) Read(p []byte) (int, error) {
	n, err := g.Conn.Read(p)
	if bad := g.in.feed(p[:n], rpcHeader, g.check); bad != nil {
		g.fail(bad)
		return 0, bad
	}
	return n, err
}

func (g *rpcGuard) check(head []byte) (uint32, error) {
	length, stream, kind := parseRPC(head)
	if length > rpcMax {
		return 0, misbehaved("a message of %d bytes", length)
	}
	if kind != rpcResponse {
		return 0, misbehaved("a message that is not an answer")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.open[stream] {
		return 0, misbehaved("an answer to what was not asked")
	}
	delete(g.open, stream)
	return length, nil
}
