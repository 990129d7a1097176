package flows

import (
	"encoding/binary"
	"net/netip"

	"github.com/usernet/usernet/internal/icmperror"
)

// Types of ICMP (RFC 792) and ICMPv6 (RFC 4443).
const (
	echoReply4, echoRequest4 = 0, 8
	echoRequest6, echoReply6 = 128, 129
)

const (
	protoICMP4, protoUDP, protoICMP6 = 1, 17, 58

	ipv4HdrLen, ipv6HdrLen = 20, 40
	udpHdrLen, icmpHdrLen  = 8, 8

	// An error quotes as much as fits these (RFC 1812, section 4.3.2.3; RFC 4443, section 2.4).
	maxError4, maxError6 = 576, 1280
)

// putError makes the message of e to a guest in b, which has room for maxError6. quoted is the packet that it is about,
// from its IP header on.
func putError(b []byte, e icmperror.Message, client netip.Addr, quoted ...[]byte) []byte {
	v4, room := client.Is4(), maxError6-ipv6HdrLen-icmpHdrLen
	if v4 {
		room = maxError4 - ipv4HdrLen - icmpHdrLen
	}
	clear(b[:icmpHdrLen])
	b[0], b[1] = e.Type, e.Code
	if v4 {
		binary.BigEndian.PutUint16(b[6:], uint16(min(e.MTU, 0xffff)))
	} else {
		binary.BigEndian.PutUint32(b[4:], e.MTU)
	}
	n := 0
	for _, q := range quoted {
		n += copy(b[icmpHdrLen+n:][:room-n], q)
	}
	b = b[:icmpHdrLen+n]
	putSum(b, e.From, client)
	return b
}

// putSum puts the checksum into an ICMP message.
func putSum(m []byte, src, dst netip.Addr) {
	binary.BigEndian.PutUint16(m[2:], 0)
	binary.BigEndian.PutUint16(m[2:], ^icmpSum(m, src, dst))
}

// icmpSum is the sum of an ICMP message and, in IPv6, of the pseudo header; 0xffff where the checksum is right.
func icmpSum(m []byte, src, dst netip.Addr) uint16 {
	if src.Is4() {
		return sum(m, 0)
	}
	s, d := src.As16(), dst.As16()
	return sum(m, uint32(sum(s[:], 0))+uint32(sum(d[:], 0))+uint32(len(m))+protoICMP6)
}

// sum is the Internet checksum (RFC 1071) of b and what initial holds already, not yet inverted.
func sum(b []byte, initial uint32) uint16 {
	total := uint64(initial)
	for len(b) >= 4 {
		total += uint64(binary.BigEndian.Uint32(b))
		b = b[4:]
	}
	if len(b) >= 2 {
		total += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) > 0 {
		total += uint64(b[0]) << 8
	}
	for total > 0xffff {
		total = total>>16 + total&0xffff
	}
	return uint16(total)
}

// putIP writes an IP header without options in front of length bytes of proto, and returns its length. It stands for one
// that was sent and is not there any more.
func putIP(b []byte, proto uint8, length int, src, dst netip.Addr) int {
	if !src.Is4() {
		clear(b[:ipv6HdrLen])
		b[0], b[6], b[7] = 6<<4, proto, 1
		binary.BigEndian.PutUint16(b[4:], uint16(length))
		s, d := src.As16(), dst.As16()
		copy(b[8:], s[:])
		copy(b[24:], d[:])
		return ipv6HdrLen
	}
	clear(b[:ipv4HdrLen])
	b[0], b[8], b[9] = 4<<4|ipv4HdrLen/4, 1, proto
	binary.BigEndian.PutUint16(b[2:], uint16(ipv4HdrLen+length))
	s, d := src.As4(), dst.As4()
	copy(b[12:], s[:])
	copy(b[16:], d[:])
	binary.BigEndian.PutUint16(b[10:], ^sum(b[:ipv4HdrLen], 0))
	return ipv4HdrLen
}

// putUDP writes the IP and the UDP header of a datagram that begins with payload. Nobody verifies the checksum of what
// an error quotes, which is mostly not there to the end.
func putUDP(b []byte, src, dst netip.AddrPort, payload int) []byte {
	n := putIP(b, protoUDP, udpHdrLen+payload, src.Addr(), dst.Addr())
	binary.BigEndian.PutUint16(b[n:], src.Port())
	binary.BigEndian.PutUint16(b[n+2:], dst.Port())
	binary.BigEndian.PutUint16(b[n+4:], uint16(udpHdrLen+payload))
	binary.BigEndian.PutUint16(b[n+6:], 0)
	return b[:n+udpHdrLen]
}

// isWhole tells of an IP header whether its packet must not be cut on its way: it has DF, or is IPv6 and was not cut by
// its sender.
func isWhole(header []byte) bool {
	const dontFragment, fragmentHdr = 0x40, 44
	switch {
	case len(header) >= ipv4HdrLen && header[0]>>4 == 4:
		return header[6]&dontFragment != 0
	case len(header) >= ipv6HdrLen && header[0]>>4 == 6:
		return header[6] != fragmentHdr
	}
	return false
}

// quotation is an echo request that somebody's error quotes.
type quotation struct {
	dst     netip.Addr
	ident   uint16
	seq     uint16
	message []byte // from the ICMP header on
}

// parseError reads an ICMP error, from its ICMP header on, and the echo request that it quotes; false: it is something
// else.
func parseError(v4 bool, m []byte) (e icmperror.Message, q quotation, ok bool) {
	if len(m) < icmpHdrLen || !icmperror.Passes(v4, m[0]) {
		return e, q, false
	}
	e = icmperror.Message{Type: m[0], Code: m[1]}
	switch {
	case !e.IsTooBig(v4):
	case v4:
		e.MTU = uint32(binary.BigEndian.Uint16(m[6:]))
	default:
		e.MTU = binary.BigEndian.Uint32(m[4:])
	}
	ip := m[icmpHdrLen:]
	var dst netip.Addr
	var inner []byte
	switch {
	case v4 && len(ip) >= ipv4HdrLen && ip[0]>>4 == 4 && ip[9] == protoICMP4:
		dst = netip.AddrFrom4([4]byte(ip[16:]))
		inner = ip[min(max(int(ip[0]&0xf)*4, ipv4HdrLen), len(ip)):]
	case !v4 && len(ip) >= ipv6HdrLen && ip[0]>>4 == 6 && ip[6] == protoICMP6:
		dst = netip.AddrFrom16([16]byte(ip[24:]))
		inner = ip[ipv6HdrLen:]
	}
	q, ok = parseRequest(v4, inner)
	q.dst = dst
	return e, q, ok
}

// parseRequest reads an echo request, from its ICMP header on.
func parseRequest(v4 bool, m []byte) (q quotation, ok bool) {
	request := byte(echoRequest6)
	if v4 {
		request = echoRequest4
	}
	if len(m) < icmpHdrLen || m[0] != request || m[1] != 0 {
		return q, false
	}
	return quotation{
		ident: binary.BigEndian.Uint16(m[4:]), seq: binary.BigEndian.Uint16(m[6:]), message: m,
	}, true
}

// isShown tells whether guests may see that an error comes from a. What the host says to itself, it says from addresses
// that mean something else to a guest.
func isShown(a netip.Addr) bool {
	return a.IsValid() && !a.Is4In6() && !a.IsLoopback() && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLinkLocalUnicast()
}
