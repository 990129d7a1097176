package vmnet

import (
	"bytes"
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/usernet/usernet/usermode/l2"
)

// Segments that follow each other in a batch, of one connection and without a gap, are given to netstack as one, as a network card
// would (GRO): it does the same work for each, whatever is in it.

// takeTCP takes a segment, with those that continue it, and returns how many frames that was.
func (g *guest) takeTCP(frames []l2.Frame) int {
	p := &g.p
	h, ok := p.tcp()
	if !ok || !p.intact(frames[0].Virtio, tcpChecksum) {
		g.foreign.Add(1)
		return 1
	}
	if h.Flags()&(header.TCPFlagSyn|header.TCPFlagAck) == header.TCPFlagSyn {
		g.relays.Opens(netip.AddrPortFrom(p.src, h.SourcePort()), netip.AddrPortFrom(p.dst, h.DestinationPort()))
	}
	first := *p
	size := len(first.ip())
	n := 1
	for last := h; n < len(frames) && continues(last); n++ {
		next, ok := g.follows(&first, last, &frames[n], size)
		if !ok {
			break
		}
		last = next
		size += len(next) - int(next.DataOffset())
	}
	if n == 1 {
		g.toStack(protocolOf(first.src), first.frame)
		return 1
	}
	head, body := couple(&first, frames[1:n], size)
	g.toStackViews(protocolOf(first.src), first.frame, head, body)
	return n
}

// continues tells whether a segment may be followed by more of the same: it carries data, and nothing ends with it.
func continues(h header.TCP) bool {
	return int(h.DataOffset()) < len(h) && h.Flags() == header.TCPFlagAck
}

// follows reads a frame and tells whether it is the segment that comes after last, in a packet like first that would grow to size and
// what is in the segment. A push may be the last one's.
func (g *guest) follows(first *packet, last header.TCP, f *l2.Frame, size int) (header.TCP, bool) {
	b := f.Head
	if len(f.Tail) > 0 || len(b) < first.l4 || !bytes.Equal(b[:ethLen], first.frame[:ethLen]) {
		return nil, false
	}
	p := &g.p
	if !p.decode(b) || p.fragment || p.proto != protoTCP || p.src != first.src || p.dst != first.dst || p.hops != first.hops ||
		p.ip()[1] != first.ip()[1] { // type of service, with marks of congestion
		return nil, false
	}
	h, ok := p.tcp()
	if !ok {
		return nil, false
	}
	data := len(h) - int(h.DataOffset())
	switch {
	case data == 0, size+data > maxPacket, h.DataOffset() != last.DataOffset(),
		h.Flags()&^header.TCPFlagPsh != header.TCPFlagAck,
		!bytes.Equal(h[:4], last[:4]),
		h.SequenceNumber() != last.SequenceNumber()+uint32(len(last)-int(last.DataOffset())),
		!bytes.Equal(h[header.TCPMinimumSize:h.DataOffset()], last[header.TCPMinimumSize:last.DataOffset()]),
		!p.intact(f.Virtio, tcpChecksum):
		return nil, false
	}
	return h, true
}

// couple makes one packet of first and the segments in more, which is size bytes long. Its acknowledgement and window are the last one's.
func couple(first *packet, more []l2.Frame, size int) (head, body *buffer.View) {
	headers := first.l4 + int(header.TCP(first.payload()).DataOffset())
	head, body = buffer.NewView(headers-ethLen), buffer.NewView(size-(headers-ethLen))
	head.Write(first.frame[ethLen:headers])
	body.Write(first.frame[headers:])
	var last []byte
	for i := range more {
		p := packet{}
		p.decode(more[i].Head) // without padding
		body.Write(p.frame[headers:])
		last = p.frame[:headers]
	}
	b := head.AsSlice()
	tcp := b[first.l4-ethLen:]
	copy(tcp[header.TCPAckNumOffset:], last[first.l4+header.TCPAckNumOffset:][:4])
	tcp[header.TCPFlagsOffset] |= last[first.l4+header.TCPFlagsOffset]
	copy(tcp[header.TCPWinSizeOffset:], last[first.l4+header.TCPWinSizeOffset:][:2])
	if first.v4() {
		h := header.IPv4(b)
		h.SetTotalLength(uint16(size))
		h.SetChecksum(0)
		h.SetChecksum(^h.CalculateChecksum())
	} else {
		binary.BigEndian.PutUint16(b[4:], uint16(size-ipv6Len))
	}
	return head, body
}

// maxBurst is how many datagrams are carried on at a time: what one system call takes.
const maxBurst = 64

// datagrams adds the payloads of the datagrams at the beginning of frames that continue g.p: between the same ports, and of the same
// length, but for the last, which may be shorter.
func (g *guest) datagrams(burst [][]byte, frames []l2.Frame) [][]byte {
	first := g.p
	size, total := len(burst[0]), len(burst[0])
	for i := range frames {
		f := &frames[i]
		if len(burst) == maxBurst || len(f.Tail) > 0 || len(burst[len(burst)-1]) < size || !first.precedes(f.Head) {
			break
		}
		p := &g.p
		if !p.decode(f.Head) || p.fragment || p.proto != protoUDP || !bytes.Equal(p.addresses(), first.addresses()) {
			break
		}
		payload, ok := p.udp(f.Virtio)
		if !ok || !bytes.Equal(p.payload()[:4], first.payload()[:4]) || len(payload) == 0 || len(payload) > size {
			break
		}
		if total += len(payload); total > maxPacket-ipv4Len-udpLen {
			break
		}
		burst = append(burst, payload)
	}
	return burst
}

// precedes tells whether a frame has the same Ethernet header as p's, and the same of what an IP header says of how it is to be carried.
func (p *packet) precedes(frame []byte) bool {
	if len(frame) < p.l4 || !bytes.Equal(frame[:ethLen], p.frame[:ethLen]) {
		return false
	}
	a, b := p.frame[ethLen:], frame[ethLen:]
	if p.v4() {
		return a[1] == b[1] && a[6] == b[6] && a[8] == b[8] // type of service, DF, TTL
	}
	return bytes.Equal(a[:4], b[:4]) && a[7] == b[7] // class and flow label, hop limit
}
