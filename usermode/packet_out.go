package usermode

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/usernet/usernet/internal/icmperror"
)

// Packets to a container are made in place, without netstack: whoever has a payload leaves room in front of it.

// hopsOut is the TTL of what we send to containers (RFC 1700).
const hopsOut = 64

// ipHdrLen is the length of an IP header without options of a's version.
func ipHdrLen(a netip.Addr) int {
	if a.Is4() {
		return ipv4HdrLen
	}
	return ipv6HdrLen
}

// putIP writes an IP header without options that precedes length bytes of proto. IPv4 packets may be cut further on,
// for which they need an id.
func putIP(b []byte, proto uint8, length int, src, dst netip.Addr, id uint16) {
	if !src.Is4() {
		b[0], b[1], b[2], b[3] = 6<<4, 0, 0, 0
		binary.BigEndian.PutUint16(b[4:], uint16(length))
		b[6], b[7] = proto, hopsOut
		s, d := src.As16(), dst.As16()
		copy(b[8:], s[:])
		copy(b[24:], d[:])
		return
	}
	b[0], b[1] = 4<<4|ipv4HdrLen/4, 0
	binary.BigEndian.PutUint16(b[2:], uint16(ipv4HdrLen+length))
	binary.BigEndian.PutUint16(b[4:], id)
	b[6], b[7], b[8], b[9], b[10], b[11] = 0, 0, hopsOut, proto, 0, 0
	s, d := src.As4(), dst.As4()
	copy(b[12:], s[:])
	copy(b[16:], d[:])
	binary.BigEndian.PutUint16(b[10:], ^checksum.Checksum(b[:ipv4HdrLen], 0))
}

// addressSum is the pseudo header's sum for the IP header b.
func addressSum(b []byte, proto uint8, length int) uint16 {
	if b[0]>>4 == 4 {
		return pseudoSum(b[12:20], proto, length)
	}
	return pseudoSum(b[8:40], proto, length)
}

// putUDP writes a virtio header, an IP header and a UDP header into the end of the headroom of b and returns the frame
// that begins there. With partial, the checksum is left to the kernel, which will not need it.
func putUDP(b []byte, src, dst netip.AddrPort, id uint16, partial bool) []byte {
	ipLen := ipHdrLen(src.Addr())
	b = b[headroom-virtioHdrLen-ipLen-udpHdrLen:]
	length := len(b) - virtioHdrLen - ipLen
	ip, u := b[virtioHdrLen:], header.UDP(b[virtioHdrLen+ipLen:])
	putIP(ip, unix.IPPROTO_UDP, length, src.Addr(), dst.Addr(), id)
	u.SetSourcePort(src.Port())
	u.SetDestinationPort(dst.Port())
	u.SetLength(uint16(length))
	u.SetChecksum(0)
	sum := addressSum(ip, unix.IPPROTO_UDP, length)
	var virtio virtioHdr
	if partial {
		virtio = virtioHdr{flags: unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, csumStart: uint16(ipLen), csumOffset: udpChecksum}
		u.SetChecksum(sum)
	} else if sum = ^checksum.Checksum(u, sum); sum == 0 {
		u.SetChecksum(0xffff) // zero says that there is none (RFC 768)
	} else {
		u.SetChecksum(sum)
	}
	virtio.encode(b)
	return b
}

// putICMP writes a virtio header and an IP header into the headroom of b, behind which there is an ICMP message. It
// completes the message's checksum and returns the frame.
func putICMP(b []byte, src, dst netip.Addr, id uint16) []byte {
	ipLen := ipHdrLen(src)
	b = b[icmpRoom-virtioHdrLen-ipLen:]
	ip, m := b[virtioHdrLen:], b[virtioHdrLen+ipLen:]
	proto, sum := uint8(unix.IPPROTO_ICMP), uint16(0)
	if !src.Is4() {
		proto = unix.IPPROTO_ICMPV6
	}
	putIP(ip, proto, len(m), src, dst, id)
	if !src.Is4() {
		sum = addressSum(ip, proto, len(m))
	}
	binary.BigEndian.PutUint16(m[icmpChecksum:], 0)
	binary.BigEndian.PutUint16(m[icmpChecksum:], ^checksum.Checksum(m, sum))
	virtioHdr{}.encode(b)
	return b
}

// icmpRoom is what putICMP may need in front of a message.
const icmpRoom = virtioHdrLen + ipv6HdrLen

// An error quotes as much as fits these (RFC 1812, section 4.3.2.3; RFC 4443, section 2.4).
const (
	maxError4 = 576
	maxError6 = header.IPv6MinimumMTU
)

// putError makes the frame of e to the container, in b, which has room for maxError6 and a virtio header. quoted is the
// packet that it is about, from its IP header on.
func putError(b []byte, e icmperror.Message, container, dst netip.Addr, id uint16, quoted ...[]byte) []byte {
	from := e.From
	if isReserved(from) || from.Is4() != container.Is4() { // nobody in particular, or who must not be shown
		from = dst
	}
	room := maxError6 - ipv6HdrLen - icmpHdrLen
	if container.Is4() {
		room = maxError4 - ipv4HdrLen - icmpHdrLen
	}
	m := b[icmpRoom : icmpRoom+icmpHdrLen]
	clear(m)
	m[0], m[1] = e.Type, e.Code
	if container.Is4() {
		binary.BigEndian.PutUint16(m[6:], uint16(min(e.MTU, 0xffff)))
	} else {
		binary.BigEndian.PutUint32(m[4:], e.MTU)
	}
	n := 0
	for _, q := range quoted {
		n += copy(b[icmpRoom+icmpHdrLen+n:][:room-n], q)
	}
	return putICMP(b[:icmpRoom+icmpHdrLen+n], from, container, id)
}
