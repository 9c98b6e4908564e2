package agentapi

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// collect runs a scanner over p, cut at random places.
func collect(p []byte, cut func(left int) int) (payload []byte, ids []sessionID, bad int) {
	var sc scanner
	for len(p) > 0 {
		n := min(max(cut(len(p)), 1), len(p))
		sc.feed(p[:n], func(d []byte) { payload = append(payload, d...) },
			func(id sessionID) { ids = append(ids, id) }, func() { bad++ })
		p = p[n:]
	}
	return payload, ids, bad
}

func all(left int) int { return left }

func TestStuffing(t *testing.T) {
	id := newSessionID()
	for name, payload := range map[string][]byte{
		"plain":        []byte("hello"),
		"prefix":       []byte(prefix),
		"twice":        []byte(prefix + prefix),
		"almost":       []byte(prefix[:7] + prefix[:9] + "x" + prefix[:1]),
		"whole marker": appendMarker(nil, kindAttach, id),
		"echo":         appendMarker([]byte("x"), kindEcho, id),
	} {
		t.Run(name, func(t *testing.T) {
			for round := range 50 {
				cut := func(left int) int { return 1 + rand.IntN(left) }
				if round == 0 {
					cut = all
				}
				var st stuffer
				var wire []byte
				for p := payload; len(p) > 0; {
					n := cut(len(p))
					wire = st.append(wire, p[:n])
					p = p[n:]
				}
				// A marker behind it ends the session, which sees the prefix.
				wire = appendMarker(wire, kindAttach, id)
				got, ids, bad := collect(wire, cut)
				want := append(bytes.Clone(payload), prefix...)
				if !bytes.Equal(got, want) || len(ids) != 1 || ids[0] != id || bad != 0 {
					t.Fatalf("got %q, %d markers, %d bad; want %q and one marker", got, len(ids), bad, want)
				}
			}
		})
	}
}

// TestRepeatedMarker: what the host repeats is no payload of the session.
func TestRepeatedMarker(t *testing.T) {
	id := newSessionID()
	m := appendMarker(nil, kindAttach, id)
	wire := append(bytes.Repeat(m, 3), 0, 1, 2, prefix[0])
	for _, cut := range []func(int) int{all, func(int) int { return 1 }, func(int) int { return 7 }} {
		got, ids, bad := collect(wire, cut)
		// The first prefix still went to whatever session was there before.
		if want := append([]byte(prefix), 0, 1, 2, prefix[0]); !bytes.Equal(got, want) || len(ids) != 3 || bad != 0 {
			t.Errorf("got %q, %d markers, %d bad", got, len(ids), bad)
		}
	}
}

func TestMarkerFoundInTheMiddle(t *testing.T) {
	a, b := newSessionID(), newSessionID()
	ma, mb := appendMarker(nil, kindAttach, a), appendMarker(nil, kindAttach, b)
	for n := range len(ma) {
		wire := append(append([]byte("half a fra"), ma[:n]...), mb...)
		_, ids, _ := collect(wire, all)
		if len(ids) != 1 || ids[0] != b {
			t.Errorf("marker cut at %d: the next one was found %d times", n, len(ids))
		}
	}
}

func FuzzScanner(f *testing.F) {
	id := sessionID{1, 2, 3}
	m := appendMarker(nil, kindAttach, id)
	f.Add([]byte("plain"), uint8(3))
	f.Add(m, uint8(1))
	f.Add(append(bytes.Clone(m[:20]), m...), uint8(7))
	f.Add([]byte(prefix+"\x00"+prefix+"\x07"), uint8(2))
	f.Fuzz(func(t *testing.T, wire []byte, step uint8) {
		payload, ids, _ := collect(wire, func(int) int { return int(step) })
		if len(payload)+len(ids)*markerLen > len(wire)+len(prefix)*len(wire) {
			t.Fatal("more came out than went in")
		}
		// Whatever stands before it, a marker is found.
		_, after, _ := collect(append(bytes.Clone(wire), append([]byte{0}, append(make([]byte, bodyLen), m...)...)...), all)
		if len(after) == 0 || after[len(after)-1] != id {
			t.Fatalf("the marker behind %q was not found", wire)
		}
		// Stuffed payload never holds a marker and comes back whole.
		var st stuffer
		got, ids, bad := collect(st.append(nil, wire), func(int) int { return int(step) })
		if len(ids) != 0 || bad != 0 || !bytes.Equal(got, wire) {
			t.Fatalf("stuffing %q gave %q, %d markers, %d bad", wire, got, len(ids), bad)
		}
	})
}

func FuzzReadMessage(f *testing.F) {
	var b bytes.Buffer
	WriteMessage(&b, &StreamHeader{Kind: StreamHeader_LOGS, ContainerId: "c", Offset: 7})
	f.Add(b.Bytes())
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{0, 0, 0, 2, 8})
	f.Fuzz(func(t *testing.T, p []byte) {
		var h StreamHeader
		r := bytes.NewReader(p)
		for ReadMessage(r, &h) == nil {
		}
	})
}
