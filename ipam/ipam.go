// Package ipam chooses a subnet and addresses where the caller brought none: Docker's null IPAM, a stand-alone run.
// It keeps no state; what is taken is asked of the caller, whose table is the only truth.
package ipam

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/usernet/usernet"
)

// ErrExhausted says that nothing is left to give.
var ErrExhausted = errors.New("exhausted")

// pool is where subnets come from: a part of 10.0.0.0/8 (RFC 1918) that neither Docker's default address pools nor
// Podman's use.
var pool = netip.MustParsePrefix("10.87.0.0/16")

// subnetBits is the prefix length of a subnet taken from pool: 253 endpoints.
const subnetBits = 24

// Subnet4 returns a /24 that overlaps none of used, with its first address as gateway.
func Subnet4(used []netip.Prefix) (usernet.Subnet, error) {
	for p := netip.PrefixFrom(pool.Addr(), subnetBits); pool.Contains(p.Addr()); p = following(p) {
		if !overlapsAny(p, used) {
			return usernet.Subnet{Prefix: p, Gateway: p.Addr().Next()}, nil
		}
	}
	return usernet.Subnet{}, fmt.Errorf("choose a subnet in %s: %w", pool, ErrExhausted)
}

// following is the /24 behind p.
func following(p netip.Prefix) netip.Prefix {
	a := p.Addr().As4()
	n := uint32(a[0])<<24 | uint32(a[1])<<16 | uint32(a[2])<<8
	n += 1 << (32 - subnetBits)
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), 0}), subnetBits)
}

func overlapsAny(p netip.Prefix, used []netip.Prefix) bool {
	for _, u := range used {
		if p.Overlaps(u) {
			return true
		}
	}
	return false
}

// maxTries bounds the search in a subnet: an IPv6 subnet has no end that one could walk to.
const maxTries = 1 << 16

// Next returns the lowest address of the subnet, or of its range from First to Last, that is free: not the network's or, for
// IPv4, the broadcast address (RFC 919), not the gateway, not reserved and not taken. It wraps ErrExhausted when there is none.
func Next(s usernet.Subnet, taken func(netip.Addr) bool) (netip.Addr, error) {
	a := s.Prefix.Masked().Addr()
	if s.First.IsValid() {
		a = s.First
	}
	for tries := 0; tries < maxTries && s.Prefix.Contains(a); tries++ {
		if s.Last.IsValid() && s.Last.Less(a) {
			break
		}
		if usable(s, a) && !taken(a) {
			return a, nil
		}
		a = a.Next()
	}
	return netip.Addr{}, fmt.Errorf("choose an address in %s: %w", s.Prefix, ErrExhausted)
}

func usable(s usernet.Subnet, a netip.Addr) bool {
	if a == s.Gateway {
		return false
	}
	for _, r := range s.Reserved {
		if a == r {
			return false
		}
	}
	if s.Prefix.Bits() >= a.BitLen()-1 { // RFC 3021, RFC 6164: both addresses of a point-to-point link count
		return true
	}
	if a == s.Prefix.Masked().Addr() { // IPv6: the subnet-router anycast address, RFC 4291 §2.6.1
		return false
	}
	return !a.Is4() || s.Prefix.Contains(a.Next())
}
