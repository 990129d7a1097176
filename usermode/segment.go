package usermode

import (
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// Software segmentation: what the kernel does with a virtio_net_hdr, for a kernel that does not do it.

// maxTCPHeaders is the longest IP and TCP header that netstack sends: it puts in no IP options and no extension headers.
const maxTCPHeaders = header.IPv6MinimumSize + header.TCPHeaderMaximumSize

var packets = sync.Pool{New: func() any { return new([gsoMaxSize]byte) }}

// segments gives the TCP packet that b holds, whose checksum may be missing, to emit: in segments of at most mss bytes
// of payload, with all checksums. What emit gets is valid until it returns. It tells whether b is such a packet.
func segments(b []byte, mss int, emit func(headers, payload []byte)) bool {
	ipLen, ok := tcpOffset(b)
	if !ok || len(b) < ipLen+header.TCPMinimumSize {
		return false
	}
	headersLen := ipLen + int(header.TCP(b[ipLen:]).DataOffset())
	if headersLen < ipLen+header.TCPMinimumSize || headersLen > len(b) {
		return false
	}
	payload := b[headersLen:]
	if mss <= 0 {
		mss = max(len(payload), 1)
	}
	var scratch [maxTCPHeaders]byte
	for sent := 0; sent == 0 || sent < len(payload); sent += mss {
		piece := payload[sent:min(sent+mss, len(payload))]
		headers := scratch[:copy(scratch[:], b[:headersLen])]
		tcp := header.TCP(headers[ipLen:])
		tcp.SetSequenceNumber(tcp.SequenceNumber() + uint32(sent))
		flags := tcp.Flags()
		if sent+len(piece) < len(payload) {
			flags &^= header.TCPFlagFin | header.TCPFlagPsh
		}
		if sent > 0 {
			flags &^= header.TCPFlagCwr // RFC 3168, 6.1.2: once
		}
		tcp.SetFlags(uint8(flags))
		finish(headers, ipLen, piece, uint16(sent/mss))
		emit(headers, piece)
	}
	return true
}

// tcpOffset is the length of the IP header of b, if it stands right before a TCP header.
func tcpOffset(b []byte) (int, bool) {
	switch {
	case len(b) >= header.IPv4MinimumSize && b[0] == 4<<4|header.IPv4MinimumSize/4:
		return header.IPv4MinimumSize, header.IPv4(b).TransportProtocol() == header.TCPProtocolNumber
	case len(b) >= header.IPv6MinimumSize && b[0]>>4 == 6:
		return header.IPv6MinimumSize, header.IPv6(b).NextHeader() == uint8(header.TCPProtocolNumber)
	}
	return 0, false
}

// finish sets the fields of headers that depend on the payload; n is the segment's number.
func finish(headers []byte, ipLen int, payload []byte, n uint16) {
	var src, dst tcpip.Address
	tcp := header.TCP(headers[ipLen:])
	length := len(tcp) + len(payload)
	if ipLen == header.IPv4MinimumSize {
		ip := header.IPv4(headers)
		src, dst = ip.SourceAddress(), ip.DestinationAddress()
		ip.SetTotalLength(uint16(ipLen + length))
		ip.SetID(ip.ID() + n)
		ip.SetChecksum(0)
		ip.SetChecksum(^ip.CalculateChecksum())
	} else {
		ip := header.IPv6(headers)
		src, dst = ip.SourceAddress(), ip.DestinationAddress()
		ip.SetPayloadLength(uint16(length))
	}
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, src, dst, uint16(length))
	tcp.SetChecksum(0)
	tcp.SetChecksum(^tcp.CalculateChecksum(checksum.Checksum(payload, sum)))
}

// flatten copies pkt into b and returns what it occupies there.
func flatten(b []byte, pkt *stack.PacketBuffer) []byte {
	n := 0
	views, skip := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		s := v.AsSlice()
		from := min(skip, len(s))
		skip -= from
		n += copy(b[n:], s[from:])
	}
	return b[:n]
}
