package vmnet

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/usernet/usernet/usermode/l2"
)

const (
	ethLen  = header.EthernetMinimumSize
	ipv4Len = header.IPv4MinimumSize
	ipv6Len = header.IPv6MinimumSize
	udpLen  = header.UDPMinimumSize

	protoICMP     = uint8(header.ICMPv4ProtocolNumber)
	protoTCP      = uint8(header.TCPProtocolNumber)
	protoUDP      = uint8(header.UDPProtocolNumber)
	protoICMPv6   = uint8(header.ICMPv6ProtocolNumber)
	protoFragment = uint8(header.IPv6FragmentHeader)

	udpChecksum = 6 // where it is in the header
	tcpChecksum = header.TCPChecksumOffset
)

// packet is an IP packet in an Ethernet frame, as far as the gateway reads it.
type packet struct {
	frame    []byte // up to the packet's end: without padding
	l4       int    // where what follows the IP header begins
	src, dst netip.Addr
	proto    uint8 // of layer 4
	hops     uint8 // TTL or hop limit
	fragment bool  // what follows is not all, or is a fragment header
}

// decode reads a frame of which the EtherType says that it is IP. It is false for what has a wrong length or sum, and for what the
// gateway carries nowhere: options, and extension headers other than that of a fragment.
func (p *packet) decode(frame []byte) bool {
	if len(frame) <= ethLen {
		return false
	}
	switch frame[12] {
	case 0x08:
		return p.decode4(frame)
	default:
		return p.decode6(frame)
	}
}

func (p *packet) decode4(frame []byte) bool {
	h := header.IPv4(frame[ethLen:])
	if len(h) < ipv4Len || h[0] != 0x45 || checksum.Checksum(h[:ipv4Len], 0) != 0xffff {
		return false
	}
	length := int(h.TotalLength())
	if length < ipv4Len || length > len(h) {
		return false
	}
	p.frame, p.l4 = frame[:ethLen+length], ethLen+ipv4Len
	p.src, p.dst = netip.AddrFrom4([4]byte(h[12:16])), netip.AddrFrom4([4]byte(h[16:20]))
	p.proto, p.hops = h[9], h[8]
	p.fragment = binary.BigEndian.Uint16(h[6:])&0x3fff != 0 // more of them, or an offset
	return true
}

func (p *packet) decode6(frame []byte) bool {
	h := frame[ethLen:]
	if len(h) < ipv6Len || h[0]>>4 != 6 {
		return false
	}
	length := ipv6Len + int(binary.BigEndian.Uint16(h[4:]))
	if length > len(h) {
		return false
	}
	p.frame, p.l4 = frame[:ethLen+length], ethLen+ipv6Len
	p.src, p.dst = netip.AddrFrom16([16]byte(h[8:24])), netip.AddrFrom16([16]byte(h[24:40]))
	p.proto, p.hops, p.fragment = h[6], h[7], h[6] == protoFragment
	return true
}

func (p *packet) v4() bool        { return p.src.Is4() }
func (p *packet) payload() []byte { return p.frame[p.l4:] }
func (p *packet) ip() []byte      { return p.frame[ethLen:] }
func (p *packet) addresses() []byte {
	if p.v4() {
		return p.frame[ethLen+12 : ethLen+20]
	}
	return p.frame[ethLen+8 : ethLen+40]
}

// ports are those of TCP or UDP, whose header must be there.
func (p *packet) ports() (src, dst uint16) {
	b := p.payload()
	return binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
}

// intact tells whether the checksum of TCP or UDP, at the given place in its header, is right, or need not be looked at: the other end's
// kernel has left it to us, or has seen that it was right.
func (p *packet) intact(v l2.Virtio, at int) bool {
	switch {
	case v.Flags&l2.NeedsCsum != 0:
		return int(v.CsumStart) == p.l4 && int(v.CsumOffset) == at
	case v.Flags&l2.DataValid != 0:
		return true
	}
	return checksum.Checksum(p.payload(), p.pseudoSum()) == 0xffff
}

// pseudoSum is the sum of the pseudo header (RFC 768, RFC 8200).
func (p *packet) pseudoSum() uint16 {
	sum := checksum.Combine(checksum.Checksum(p.addresses(), 0), uint16(p.proto))
	return checksum.Combine(sum, uint16(len(p.payload())))
}

// tcp tells whether p has a whole TCP header.
func (p *packet) tcp() (header.TCP, bool) {
	h := header.TCP(p.payload())
	if len(h) < header.TCPMinimumSize || int(h.DataOffset()) < header.TCPMinimumSize || int(h.DataOffset()) > len(h) {
		return nil, false
	}
	return h, true
}

// udp cuts p to its datagram, and returns that. It is false if that is not one.
func (p *packet) udp(v l2.Virtio) (payload []byte, ok bool) {
	b := p.payload()
	if len(b) < udpLen {
		return nil, false
	}
	length := int(binary.BigEndian.Uint16(b[4:]))
	if length < udpLen || length > len(b) {
		return nil, false
	}
	p.frame = p.frame[:p.l4+length]
	src, dst := p.ports()
	if src == 0 || dst == 0 {
		return nil, false
	}
	if b[udpChecksum] == 0 && b[udpChecksum+1] == 0 && v.Flags&l2.NeedsCsum == 0 {
		return b[udpLen:length], p.v4() // there is none (RFC 768); IPv6 must have one (RFC 8200, section 8.1)
	}
	return b[udpLen:length], p.intact(v, udpChecksum)
}

// icmp returns a message whose checksum is right.
func (p *packet) icmp() (message []byte, ok bool) {
	b := p.payload()
	if len(b) < 8 {
		return nil, false
	}
	var sum uint16
	if !p.v4() {
		sum = p.pseudoSum()
	}
	return b, checksum.Checksum(b, sum) == 0xffff
}
