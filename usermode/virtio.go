package usermode

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// virtioHdrLen is the length of struct virtio_net_hdr (linux/virtio_net.h): what stands in front of every packet that
// is read from or written to a TUN with IFF_VNET_HDR, unless TUNSETVNETHDRSZ said otherwise.
const virtioHdrLen = 10

// gsoMaxSize is the longest packet the kernel hands over as one or takes as one: an IP length field's worth.
const gsoMaxSize = 65535

// virtioHdr is struct virtio_net_hdr. Its numbers have the machine's byte order, unless TUNSETVNETLE said otherwise.
type virtioHdr struct {
	flags      uint8
	gsoType    uint8
	hdrLen     uint16 // bytes before the first segment's payload
	gsoSize    uint16 // payload bytes of each segment
	csumStart  uint16 // where the checksum's coverage begins
	csumOffset uint16 // where, from csumStart, the checksum belongs
}

var (
	errShortFrame = errors.New("frame shorter than its header")
	errNotSegment = errors.New("segmentation that was not asked for")
)

// decodeVirtio reads the header in front of a packet. An error means that the packet cannot be handled as one TCP
// segment or one datagram; the packet is then dropped.
func decodeVirtio(b []byte) (virtioHdr, error) {
	if len(b) < virtioHdrLen {
		return virtioHdr{}, errShortFrame
	}
	h := virtioHdr{
		flags:      b[0],
		gsoType:    b[1],
		hdrLen:     binary.NativeEndian.Uint16(b[2:]),
		gsoSize:    binary.NativeEndian.Uint16(b[4:]),
		csumStart:  binary.NativeEndian.Uint16(b[6:]),
		csumOffset: binary.NativeEndian.Uint16(b[8:]),
	}
	// A TCP super-segment needs nothing done: netstack takes it whole. Many datagrams glued together would have to be
	// taken apart, which is why the TUN is never told that we accept them (TUN_F_USO, TUN_F_UFO).
	switch h.gsoType &^ unix.VIRTIO_NET_HDR_GSO_ECN {
	case unix.VIRTIO_NET_HDR_GSO_NONE, unix.VIRTIO_NET_HDR_GSO_TCPV4, unix.VIRTIO_NET_HDR_GSO_TCPV6:
		return h, nil
	}
	return virtioHdr{}, fmt.Errorf("gso type %#x: %w", h.gsoType, errNotSegment)
}

// encode writes h into the first virtioHdrLen bytes of b.
func (h virtioHdr) encode(b []byte) {
	_ = b[virtioHdrLen-1]
	b[0], b[1] = h.flags, h.gsoType
	binary.NativeEndian.PutUint16(b[2:], h.hdrLen)
	binary.NativeEndian.PutUint16(b[4:], h.gsoSize)
	binary.NativeEndian.PutUint16(b[6:], h.csumStart)
	binary.NativeEndian.PutUint16(b[8:], h.csumOffset)
}

// virtioHdrFor is the header that makes the kernel finish what netstack left undone in pkt: the checksum, and the cut
// into segments.
func virtioHdrFor(pkt *stack.PacketBuffer) virtioHdr {
	gso := pkt.GSOOptions
	var h virtioHdr
	if gso.NeedsCsum {
		h.flags = unix.VIRTIO_NET_HDR_F_NEEDS_CSUM
		h.csumStart = gso.L3HdrLen
		h.csumOffset = gso.CsumOffset
	}
	if gso.MSS == 0 || pkt.Data().Size() <= int(gso.MSS) {
		return h
	}
	switch gso.Type {
	case stack.GSOTCPv4:
		h.gsoType = unix.VIRTIO_NET_HDR_GSO_TCPV4
	case stack.GSOTCPv6:
		h.gsoType = unix.VIRTIO_NET_HDR_GSO_TCPV6
	default:
		return h
	}
	h.hdrLen = uint16(pkt.HeaderSize())
	h.gsoSize = gso.MSS
	return h
}

// classify tells the protocol of an IP packet of which b is the beginning, and whether netstack should see it. What
// could not be carried on by a host socket anyway is refused here, before netstack spends anything on it: groups and
// broadcasts, IP options and routing headers, ICMP other than echo requests (an error message from a guest could only
// disturb somebody else's connection).
func classify(b []byte) (tcpip.NetworkProtocolNumber, bool) {
	if len(b) == 0 {
		return 0, false
	}
	switch b[0] >> 4 {
	case 4:
		return header.IPv4ProtocolNumber, carries4(b)
	case 6:
		return header.IPv6ProtocolNumber, carries6(b)
	}
	return 0, false
}

func carries4(b []byte) bool {
	if len(b) < header.IPv4MinimumSize {
		return false
	}
	h := header.IPv4(b)
	if h.HeaderLength() != header.IPv4MinimumSize {
		return false
	}
	src, dst := h.SourceAddressSlice(), h.DestinationAddressSlice()
	// 0/8, 127/8, and everything from 224/4 up: groups, class E and the broadcast address.
	if src[0] == 0 || src[0] == 127 || src[0] >= 224 || dst[0] == 0 || dst[0] == 127 || dst[0] >= 224 {
		return false
	}
	if h.Protocol() != uint8(header.ICMPv4ProtocolNumber) || h.FragmentOffset() != 0 {
		return true
	}
	return len(b) > header.IPv4MinimumSize && header.ICMPv4Type(b[header.IPv4MinimumSize]) == header.ICMPv4Echo
}

func carries6(b []byte) bool {
	if len(b) < header.IPv6MinimumSize {
		return false
	}
	h := header.IPv6(b)
	src, dst := h.SourceAddress(), h.DestinationAddress()
	for _, a := range [...]tcpip.Address{src, dst} {
		if header.IsV6MulticastAddress(a) || header.IsV6LoopbackAddress(a) || a == header.IPv6Any {
			return false
		}
	}
	switch h.NextHeader() {
	case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
		return false
	case unix.IPPROTO_ICMPV6:
		return len(b) > header.IPv6MinimumSize && header.ICMPv6Type(b[header.IPv6MinimumSize]) == header.ICMPv6EchoRequest
	}
	return true
}
