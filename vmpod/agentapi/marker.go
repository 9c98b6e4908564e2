package agentapi

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
)

// A marker is prefix, a kind, the session id and the id's checksum. The first
// byte of the prefix does not occur in it again, so that a search never has
// to go back, and is rare in text.
const prefix = "\xf5atoll-resync\xfe\n"

const (
	kindEscape = 0x00 // the prefix itself was payload
	kindAttach = 0x01 // host to guest: a new session begins here
	kindEcho   = 0x02 // guest to host: it has begun
	kindEnd    = 0x03 // host to guest: the session is over, and none follows
	idLen      = 16
	bodyLen    = idLen + 4
	markerLen  = len(prefix) + 1 + bodyLen
)

// PlaceholderMAC is the address of a NIC that stands for another: it is the
// interface that an agent is told of by an address that no NIC has, and is to
// be given that address.
const PlaceholderMAC = "02:61:74:6f:6c:6c"

type sessionID [idLen]byte

func newSessionID() (id sessionID) {
	rand.Read(id[:]) // never fails since Go 1.24
	return id
}

// checksum is FNV-1a: it tells a whole id from the halves of two. A CRC's
// table would cost a booting guest milliseconds.
func checksum(id []byte) uint32 {
	h := uint32(2166136261)
	for _, c := range id {
		h = (h ^ uint32(c)) * 16777619
	}
	return h
}

// appendMarker appends the marker of the given kind.
func appendMarker(b []byte, kind byte, id sessionID) []byte {
	b = append(b, prefix...)
	b = append(b, kind)
	b = append(b, id[:]...)
	return binary.BigEndian.AppendUint32(b, checksum(id[:]))
}

// parseBody reads what follows the kind.
func parseBody(b []byte) (id sessionID, ok bool) {
	copy(id[:], b)
	return id, binary.BigEndian.Uint32(b[idLen:]) == checksum(id[:])
}

// A stuffer escapes payload: wherever the prefix stands in it, across calls
// too, a kindEscape byte is put behind.
type stuffer struct{ matched int }

// append appends the stuffed form of p to dst.
func (s *stuffer) append(dst, p []byte) []byte {
	for len(p) > 0 {
		if s.matched == 0 {
			i := bytes.IndexByte(p, prefix[0])
			if i < 0 {
				return append(dst, p...)
			}
			dst = append(dst, p[:i+1]...)
			p = p[i+1:]
			s.matched = 1
			continue
		}
		c := p[0]
		p = p[1:]
		dst = append(dst, c)
		s.matched = advance(s.matched, c)
		if s.matched == len(prefix) {
			dst = append(dst, kindEscape)
			s.matched = 0
		}
	}
	return dst
}

// advance is one step of the search for prefix.
func advance(matched int, c byte) int {
	switch {
	case c == prefix[matched]:
		return matched + 1
	case c == prefix[0]:
		return 1
	}
	return 0
}

// A scanner takes what the host sent apart into payload and attach markers.
// It looks at every byte, whatever state a session is in, so a marker is
// found even in the middle of a frame that its writer never finished.
//
// Payload is passed on at once, even where it might be the beginning of a
// marker: should it be one, the session that got those bytes is over anyway.
// Only straight behind a marker are they held back, because the host repeats
// its marker until the echo reaches it, and the session must not see that.
// Nothing waits there: a session's first byte is never the prefix's.
type scanner struct {
	matched int    // bytes of prefix seen, len(prefix) when the kind is next
	body    []byte // what came after kindAttach, nil outside a marker
	fresh   bool   // no payload since the last marker
}

// feed calls data with each run of payload (valid until it returns) and
// attach for each whole marker, in order. bad is called where the prefix is
// followed by neither an escape nor a sound marker: what is being received is
// not worth going on with.
func (s *scanner) feed(p []byte, data func([]byte), attach func(sessionID), bad func()) {
	for len(p) > 0 {
		switch {
		case s.body != nil:
			n := min(bodyLen-len(s.body), len(p))
			s.body = append(s.body, p[:n]...)
			p = p[n:]
			if len(s.body) < bodyLen {
				return
			}
			body := s.body
			s.body, s.matched = nil, 0
			if id, ok := parseBody(body); ok {
				s.fresh = true
				attach(id)
				continue
			}
			// A marker cut off by the next one: look inside, too.
			bad()
			p = append(body, p...)
		case s.matched == len(prefix):
			kind := p[0]
			s.matched = 0
			switch kind {
			case kindEscape:
				p = p[1:]
				s.release(data, len(prefix))
			case kindAttach:
				p = p[1:]
				s.body = make([]byte, 0, bodyLen)
			default:
				bad()
			}
		default:
			p = s.search(p, data)
		}
	}
}

// search looks for the prefix, passes on what it looked at, and returns the
// rest.
func (s *scanner) search(p []byte, data func([]byte)) []byte {
	if s.fresh {
		if next := advance(s.matched, p[0]); next == s.matched+1 {
			s.matched = next
			return p[1:]
		}
		s.release(data, s.matched)
		s.matched, s.fresh = 0, false
	}
	i := 0
	for i < len(p) && s.matched < len(prefix) {
		if s.matched == 0 {
			n := bytes.IndexByte(p[i:], prefix[0])
			if n < 0 {
				i = len(p)
				break
			}
			i += n
		}
		s.matched = advance(s.matched, p[i])
		i++
	}
	s.pass(p[:i], data)
	return p[i:]
}

// pass gives payload on.
func (s *scanner) pass(p []byte, data func([]byte)) {
	if len(p) > 0 {
		s.fresh = false
		data(p)
	}
}

// release gives on what was held back of the prefix.
func (s *scanner) release(data func([]byte), n int) {
	if s.fresh {
		s.pass([]byte(prefix[:n]), data)
	}
}
