package usermode

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// syn is a packet that asks for a connection.
type syn struct {
	route
	packet  []byte // from the IP header on
	tcp     int    // where its TCP header is
	partial bool   // its checksum is not complete
}

// parseSYN tells whether f is a SYN that opens a connection, as nearly all are: whole, and without IPv6 extension
// headers. The result's packet is f's memory.
func parseSYN(f *frame) (syn, bool) {
	b := f.parts[0]
	if len(f.parts[1]) > 0 {
		return syn{}, false
	}
	var s syn
	if f.proto == header.IPv4ProtocolNumber {
		s.packet, s.tcp = ipv4TCP(b)
	} else {
		s.packet, s.tcp = ipv6TCP(b)
	}
	if s.packet == nil || len(s.packet) < s.tcp+header.TCPMinimumSize {
		return syn{}, false
	}
	h := header.TCP(s.packet[s.tcp:])
	const openers = header.TCPFlagFin | header.TCPFlagSyn | header.TCPFlagRst | header.TCPFlagAck
	if int(h.DataOffset()) < header.TCPMinimumSize || int(h.DataOffset()) > len(h) || h.Flags()&openers != header.TCPFlagSyn ||
		h.SourcePort() == 0 || h.DestinationPort() == 0 {
		return syn{}, false
	}
	from, to := s.addresses()
	s.client = netip.AddrPortFrom(from, h.SourcePort())
	s.destination = netip.AddrPortFrom(to, h.DestinationPort())
	s.partial = f.virtio.flags&unix.VIRTIO_NET_HDR_F_NEEDS_CSUM != 0
	return s, true
}

// ipv4TCP is the packet without padding and the place of its TCP header; nil if that is not all there.
func ipv4TCP(b []byte) ([]byte, int) {
	h := header.IPv4(b)
	if len(b) < header.IPv4MinimumSize || int(h.HeaderLength()) < header.IPv4MinimumSize || int(h.TotalLength()) < int(h.HeaderLength()) ||
		int(h.TotalLength()) > len(b) || h.Protocol() != uint8(header.TCPProtocolNumber) || h.More() || h.FragmentOffset() != 0 {
		return nil, 0
	}
	return b[:h.TotalLength()], int(h.HeaderLength())
}

// ipv6TCP is ipv4TCP for IPv6.
func ipv6TCP(b []byte) ([]byte, int) {
	h := header.IPv6(b)
	if len(b) < header.IPv6MinimumSize || h.NextHeader() != uint8(header.TCPProtocolNumber) ||
		int(h.PayloadLength()) > len(b)-header.IPv6MinimumSize {
		return nil, 0
	}
	return b[:header.IPv6MinimumSize+int(h.PayloadLength())], header.IPv6MinimumSize
}

// is4 tells the IP version.
func (s syn) is4() bool { return s.packet[0]>>4 == header.IPv4Version }

func (s syn) addresses() (from, to netip.Addr) {
	if s.is4() {
		h := header.IPv4(s.packet)
		return netip.AddrFrom4([4]byte(h.SourceAddressSlice())), netip.AddrFrom4([4]byte(h.DestinationAddressSlice()))
	}
	h := header.IPv6(s.packet)
	return netip.AddrFrom16([16]byte(h.SourceAddressSlice())), netip.AddrFrom16([16]byte(h.DestinationAddressSlice()))
}

// frame is the packet for the TUN, with its checksum completed: the container's kernel has left that to the hardware.
// A checksum that was complete stays, right or wrong.
func (s syn) frame() []byte {
	frame := append(make([]byte, virtioHdrLen, virtioHdrLen+len(s.packet)), s.packet...)
	if s.partial {
		setTCPChecksum(frame[virtioHdrLen:], s.tcp)
	}
	return frame
}

// reset is a frame for the TUN that answers the packet with a reset (RFC 9293, 3.10.7.1).
func (s syn) reset() []byte {
	from, to := s.addresses()
	size := header.IPv6MinimumSize
	if s.is4() {
		size = header.IPv4MinimumSize
	}
	frame := make([]byte, virtioHdrLen+size+header.TCPMinimumSize)
	packet := frame[virtioHdrLen:]
	src, dst := tcpip.AddrFromSlice(to.AsSlice()), tcpip.AddrFromSlice(from.AsSlice())
	if s.is4() {
		h := header.IPv4(packet)
		h.Encode(&header.IPv4Fields{
			TotalLength: uint16(len(packet)), TTL: 64, Protocol: uint8(header.TCPProtocolNumber), SrcAddr: src, DstAddr: dst,
			Flags: header.IPv4FlagDontFragment,
		})
		h.SetChecksum(^h.CalculateChecksum())
	} else {
		header.IPv6(packet).Encode(&header.IPv6Fields{
			PayloadLength: header.TCPMinimumSize, TransportProtocol: header.TCPProtocolNumber, HopLimit: 64, SrcAddr: src, DstAddr: dst,
		})
	}
	asked := header.TCP(s.packet[s.tcp:])
	header.TCP(packet[size:]).Encode(&header.TCPFields{
		SrcPort: asked.DestinationPort(), DstPort: asked.SourcePort(), DataOffset: header.TCPMinimumSize,
		Flags: header.TCPFlagRst | header.TCPFlagAck, AckNum: asked.SequenceNumber() + 1 + uint32(len(asked)-int(asked.DataOffset())),
	})
	setTCPChecksum(packet, size)
	return frame
}

// setTCPChecksum completes the checksum of the TCP segment that begins at the offset tcp of an IP packet.
func setTCPChecksum(packet []byte, tcp int) {
	addresses := packet[8:40] // source and destination
	if packet[0]>>4 == header.IPv4Version {
		addresses = packet[12:20]
	}
	segment := packet[tcp:]
	binary.BigEndian.PutUint16(segment[header.TCPChecksumOffset:], 0)
	var pseudo [8]byte // length, protocol: as IPv6 has them, and with the same sum as IPv4's (RFC 9293, 3.1)
	binary.BigEndian.PutUint32(pseudo[:], uint32(len(segment)))
	pseudo[7] = uint8(header.TCPProtocolNumber)
	sum := checksum.Checksum(segment, checksum.Checksum(pseudo[:], checksum.Checksum(addresses, 0)))
	binary.BigEndian.PutUint16(segment[header.TCPChecksumOffset:], ^sum)
}
