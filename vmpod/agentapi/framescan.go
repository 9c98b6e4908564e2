package agentapi

// A frameScanner follows, in a byte stream, a protocol of headers that are all of one
// size and have a body each.
type frameScanner struct {
	head [muxHeader]byte // the longest of the headers
	n    int             // of head
	left uint32          // of the body
}

// feed calls each, which returns the length of the body, with every header of
// so many bytes that ends in p.
func (f *frameScanner) feed(p []byte, size int, each func(head []byte) (body uint32, err error)) error {
	for len(p) > 0 {
		if f.left > 0 {
			n := min(uint32(len(p)), f.left)
			f.left -= n
			p = p[n:]
			continue
		}
		n := copy(f.head[f.n:size], p)
		f.n += n
		p = p[n:]
		if f.n < size {
			return nil
		}
		f.n = 0
		var err error
		if f.left, err = each(f.head[:size]); err != nil {
			return err
		}
	}
	return nil
}
