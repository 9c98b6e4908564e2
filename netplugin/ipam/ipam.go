// Package ipam chooses pod addresses from a prefix. It holds no state: who
// uses which address is told by the attachments, the one place where it is
// stored.
package ipam

import (
	"fmt"
	"net/netip"

	"github.com/containerd/errdefs"
)

// Next returns the first free address of prefix after the address last,
// going around at the end, so that an address that was just released rests as
// long as there are others. last may be invalid (nothing was handed out yet).
//
// The network's own address and the first one (which people take for the
// gateway) are never returned, nor is IPv4's broadcast address. Next is
// deterministic. Its error is ErrResourceExhausted when used reports every
// address as taken, ErrInvalidArgument for a prefix without any.
func Next(prefix netip.Prefix, last netip.Addr, used func(netip.Addr) bool) (netip.Addr, error) {
	first, end, err := bounds(prefix)
	if err != nil {
		return netip.Addr{}, err
	}
	start := first
	if last.IsValid() && !last.Less(first) && last.Less(end) {
		start = last.Next()
	}
	for a := start; ; {
		if !used(a) {
			return a, nil
		}
		if a == end {
			a = first
		} else {
			a = a.Next()
		}
		if a == start {
			return netip.Addr{}, fmt.Errorf("every pod address of %s (%s to %s) is in use: delete pods or give the node a larger pod CIDR: %w", prefix, first, end, errdefs.ErrResourceExhausted)
		}
	}
}

// Check returns nil if addresses can be taken from prefix.
func Check(prefix netip.Prefix) error {
	_, _, err := bounds(prefix)
	return err
}

// bounds returns the first and the last address that may be handed out.
func bounds(prefix netip.Prefix) (first, last netip.Addr, err error) {
	if !prefix.IsValid() {
		return first, last, fmt.Errorf("pod CIDR %s is not a prefix: %w", prefix, errdefs.ErrInvalidArgument)
	}
	prefix = prefix.Masked()
	if prefix.Addr().BitLen()-prefix.Bits() < 2 {
		return first, last, fmt.Errorf("pod CIDR %s has no address for a pod: it must be a /%d or larger: %w", prefix, prefix.Addr().BitLen()-2, errdefs.ErrInvalidArgument)
	}
	first = prefix.Addr().Next().Next()
	raw := prefix.Addr().AsSlice()
	for bit := prefix.Bits(); bit < len(raw)*8; bit++ {
		raw[bit/8] |= 0x80 >> (bit % 8)
	}
	last, _ = netip.AddrFromSlice(raw)
	if last.Is4() {
		last = last.Prev()
	}
	return first, last, nil
}
