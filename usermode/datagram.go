package usermode

import (
	"net/netip"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	ipv4HdrLen = header.IPv4MinimumSize
	ipv6HdrLen = header.IPv6MinimumSize
	udpHdrLen  = header.UDPMinimumSize
	icmpHdrLen = header.ICMPv4MinimumSize // echo and error messages, of both versions

	transportHdrLen = 8 // either of the last two
	// Where the checksums are.
	udpChecksum  = 6
	icmpChecksum = 2
)

// datagram is what a container sends by UDP or as an echo request: one whole packet, or put together from fragments.
type datagram struct {
	client, dst netip.AddrPort // no ports in an echo request
	hops        uint8          // TTL or hop limit, as it arrived
	whole       bool           // must not be cut on its way: has DF, or is IPv6 and was not cut by its sender
	header      []byte         // IP header and transport header, for those who quote them
	payload     [2][]byte      // what follows; the second part is seldom there
}

func (d *datagram) size() int { return len(d.payload[0]) + len(d.payload[1]) }

// verdict is what a decoder says about a packet.
type verdict int

const (
	foreign verdict = iota // something for netstack: another protocol, a fragment, options, or a bad length
	broken                 // to be dropped
	good
)

// decode reads the IP header of a frame, which classify has seen, and leaves what follows it in d.payload, with start,
// its place in the frame. ok is false unless that is one of protocol proto, not a fragment, and of a length that adds up.
func (d *datagram) decode(f *frame, proto uint8) (start int, ok bool) {
	if f.virtio.gsoType != unix.VIRTIO_NET_HDR_GSO_NONE {
		return 0, false
	}
	b := f.parts[0]
	var length int
	if f.proto == header.IPv4ProtocolNumber {
		start = ipv4HdrLen
		h := header.IPv4(b)
		if len(b) < start || h.HeaderLength() != ipv4HdrLen || h.Protocol() != proto || !h.IsChecksumValid() ||
			h.FragmentOffset() != 0 || h.Flags()&header.IPv4FlagMoreFragments != 0 {
			return 0, false
		}
		length = int(h.TotalLength()) - ipv4HdrLen
		d.hops, d.whole = h.TTL(), h.Flags()&header.IPv4FlagDontFragment != 0
	} else {
		start = ipv6HdrLen
		h := header.IPv6(b)
		if len(b) < start || h.NextHeader() != proto {
			return 0, false
		}
		length = int(h.PayloadLength())
		d.hops, d.whole = h.HopLimit(), true
	}
	if length < transportHdrLen || len(b) < start+transportHdrLen {
		return 0, false
	}
	switch first := len(b) - start; {
	case length <= first:
		d.payload = [2][]byte{b[start : start+length], nil}
	case length-first <= len(f.parts[1]):
		d.payload = [2][]byte{b[start:], f.parts[1][:length-first]}
	default:
		return 0, false
	}
	return start, true
}

// decodeUDP decodes a frame that carries one UDP datagram (RFC 768).
func (d *datagram) decodeUDP(f *frame) verdict {
	start, ok := d.decode(f, unix.IPPROTO_UDP)
	if !ok {
		return foreign
	}
	u := header.UDP(d.payload[0])
	switch length := int(u.Length()); {
	case length < udpHdrLen || length > d.size():
		return foreign
	case length <= len(d.payload[0]):
		d.payload = [2][]byte{u[:length], nil}
	default:
		d.payload[1] = d.payload[1][:length-len(u)]
	}
	if u.SourcePort() == 0 || u.DestinationPort() == 0 || !d.intact(f, start, udpChecksum) {
		return broken
	}
	d.take(f, start)
	d.client = netip.AddrPortFrom(d.client.Addr(), u.SourcePort())
	d.dst = netip.AddrPortFrom(d.dst.Addr(), u.DestinationPort())
	return good
}

// decodeEcho decodes a frame that carries one echo request (RFC 792, RFC 4443).
func (d *datagram) decodeEcho(f *frame) verdict {
	proto, request := uint8(unix.IPPROTO_ICMP), uint8(header.ICMPv4Echo)
	if f.proto == header.IPv6ProtocolNumber {
		proto, request = unix.IPPROTO_ICMPV6, uint8(header.ICMPv6EchoRequest)
	}
	start, ok := d.decode(f, proto)
	if !ok {
		return foreign
	}
	if d.payload[0][0] != request || d.payload[0][1] != 0 || !d.intact(f, start, icmpChecksum) {
		return broken
	}
	d.take(f, start)
	return good
}

// take reads the addresses, and cuts the transport header off the payload.
func (d *datagram) take(f *frame, start int) {
	b := f.parts[0]
	var src, dst netip.Addr
	if f.proto == header.IPv4ProtocolNumber {
		src, dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	} else {
		src, dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	}
	d.client, d.dst = netip.AddrPortFrom(src, 0), netip.AddrPortFrom(dst, 0)
	d.header = b[:start+transportHdrLen]
	d.payload[0] = d.payload[0][transportHdrLen:]
}

// intact verifies the checksum of d.payload, whose field is at the given offset. A container's kernel leaves it to
// the hardware, which there is none of, or has verified it already.
func (d *datagram) intact(f *frame, start, offset int) bool {
	switch {
	case f.virtio.flags&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM != 0:
		return int(f.virtio.csumStart) == start && int(f.virtio.csumOffset) == offset
	case f.virtio.flags&unix.VIRTIO_NET_HDR_F_DATA_VALID != 0:
		return true
	}
	v4 := f.proto == header.IPv4ProtocolNumber
	if offset == udpChecksum && header.UDP(d.payload[0]).Checksum() == 0 {
		return v4 // there is none (RFC 768); IPv6 must have one (RFC 8200, section 8.1)
	}
	var sum uint16
	switch {
	case !v4:
		sum = pseudoSum(f.parts[0][8:40], header.IPv6(f.parts[0]).NextHeader(), d.size())
	case offset == udpChecksum:
		sum = pseudoSum(f.parts[0][12:20], unix.IPPROTO_UDP, d.size())
	}
	// The first part has an even length when there is a second.
	return checksum.Checksum(d.payload[1], checksum.Checksum(d.payload[0], sum)) == 0xffff
}

// pseudoSum is the sum of the pseudo header: both addresses, protocol and length (RFC 768, RFC 8200).
func pseudoSum(addresses []byte, proto uint8, length int) uint16 {
	sum := checksum.Combine(checksum.Checksum(addresses, 0), uint16(proto))
	return checksum.Combine(sum, uint16(length))
}
