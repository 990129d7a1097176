package vmnet

import (
	"encoding/binary"
	"net/netip"
	"sync"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/usermode/l2"
)

// hopsOut is the TTL or hop limit of what the gateway sends.
const hopsOut = 64

// outgoing are packets on their way to a machine.
type outgoing struct {
	n      int
	frames [outgoingSize]l2.Frame
	tails  [outgoingSize][1][]byte
	heads  [outgoingSize][ethLen + ipv6Len + udpLen]byte
}

// outgoingSize is how many packets go to the switch at a time.
const outgoingSize = 16

var outgoings = sync.Pool{New: func() any { return new(outgoing) }}

// sendUDP sends datagrams to a machine.
func (n *Network) sendUDP(from, to netip.AddrPort, payloads [][]byte) {
	n.sendUDPTo(l2.MAC{}, from, to, payloads)
}

// sendUDPTo is sendUDP to a machine whose Ethernet address is known, if it is not zero.
func (n *Network) sendUDPTo(mac l2.MAC, from, to netip.AddrPort, payloads [][]byte) {
	if n.closed.Load() {
		return
	}
	o := outgoings.Get().(*outgoing)
	defer outgoings.Put(o)
	p := outgoingPacket{proto: protoUDP, headerLen: udpLen}
	p.virtio = l2.Virtio{Flags: l2.NeedsCsum, CsumOffset: udpChecksum} // which spares those the sum who take that
	binary.BigEndian.PutUint16(p.header[0:], from.Port())
	binary.BigEndian.PutUint16(p.header[2:], to.Port())
	for _, payload := range payloads {
		p.payload = payload
		binary.BigEndian.PutUint16(p.header[4:], uint16(udpLen+len(payload)))
		n.send(o, mac, from.Addr(), to.Addr(), p)
	}
	n.flush(o)
}

// sendICMP sends a complete ICMP message to a machine.
func (n *Network) sendICMP(from, to netip.Addr, message []byte) {
	proto := protoICMPv6
	if to.Is4() {
		proto = protoICMP
	}
	if n.closed.Load() {
		return
	}
	o := outgoings.Get().(*outgoing)
	defer outgoings.Put(o)
	n.send(o, l2.MAC{}, from, to, outgoingPacket{proto: proto, payload: message})
	n.flush(o)
}

// outgoingPacket is what goes into a packet to a machine.
type outgoingPacket struct {
	proto     uint8
	header    [udpLen]byte
	headerLen int // 0: it is in the payload
	payload   []byte
	virtio    l2.Virtio // if its checksum is needed
}

// send puts a packet to those that go straight to the machine's port, or sends it by netstack: if it must be cut, or the machine
// be asked for its address.
func (n *Network) send(o *outgoing, mac l2.MAC, from, to netip.Addr, p outgoingPacket) {
	known := mac != l2.MAC{}
	if !known {
		mac, known = n.stations.macOf(to)
	}
	size := p.headerLen + len(p.payload)
	headers := ipv6Len
	if to.Is4() {
		headers = ipv4Len
	}
	if headers+size > n.cfg.MTU || !known {
		n.flush(o)
		n.sendByStack(from, to, p)
		return
	}
	if o.n == outgoingSize {
		n.flush(o)
	}
	i := o.n
	o.n++
	b := append(append(append(o.heads[i][:0], mac[:]...), n.cfg.MAC[:]...), 0, 0)
	b = b[:ethLen+headers]
	putIP(b[ethLen-2:], from, to, p.proto, size)
	l4 := len(b)
	b = append(b, p.header[:p.headerLen]...)
	f := &o.frames[i]
	f.Head, f.Tail, f.Virtio = b, nil, p.virtio
	if p.virtio.Flags&l2.NeedsCsum != 0 {
		f.Virtio.CsumStart = uint16(l4)
		binary.BigEndian.PutUint16(b[l4+int(p.virtio.CsumOffset):], pseudoSum(from, to, p.proto, size))
	}
	if len(p.payload) > 0 {
		o.tails[i][0] = p.payload
		f.Tail = o.tails[i][:]
	}
}

// flush sends what has been put together.
func (n *Network) flush(o *outgoing) {
	if o.n == 0 {
		return
	}
	if full := n.sw.Send(o.frames[:o.n]); full > 0 {
		n.link.lost.Add(uint64(full))
	}
	clear(o.tails[:o.n]) // the pool must not keep the payloads' memory
	o.n = 0
}

// putIP writes an EtherType, and the header of an IP packet with size bytes in it that nobody may cut.
func putIP(b []byte, from, to netip.Addr, proto uint8, size int) {
	h := b[2:]
	if to.Is4() {
		binary.BigEndian.PutUint16(b, uint16(header.IPv4ProtocolNumber))
		ip := header.IPv4(h)
		ip.Encode(&header.IPv4Fields{
			TotalLength: uint16(ipv4Len + size), TTL: hopsOut, Protocol: proto, Flags: header.IPv4FlagDontFragment,
			SrcAddr: fromAddr(from), DstAddr: fromAddr(to),
		})
		ip.SetChecksum(^ip.CalculateChecksum())
		return
	}
	binary.BigEndian.PutUint16(b, uint16(header.IPv6ProtocolNumber))
	header.IPv6(h).Encode(&header.IPv6Fields{
		PayloadLength: uint16(size), TransportProtocol: tcpip.TransportProtocolNumber(proto), HopLimit: hopsOut,
		SrcAddr: fromAddr(from), DstAddr: fromAddr(to),
	})
}

func pseudoSum(from, to netip.Addr, proto uint8, size int) uint16 {
	a, b := fromAddr(from), fromAddr(to)
	sum := checksum.Checksum(b.AsSlice(), checksum.Checksum(a.AsSlice(), 0))
	return checksum.Combine(checksum.Combine(sum, uint16(proto)), uint16(size))
}

// sendByStack sends a packet by netstack, which cuts it if it must be cut.
func (n *Network) sendByStack(from, to netip.Addr, p outgoingPacket) {
	route, err := n.stack.FindRoute(nicID, fromAddr(from), fromAddr(to), protocolOf(to), false)
	if err != nil {
		n.link.lost.Add(1)
		return
	}
	defer route.Release()
	head := p.header[:p.headerLen]
	if len(head) == 0 { // ICMP: netstack wants to see a header of its layer
		head, p.payload = p.payload[:8], p.payload[8:]
	}
	v := buffer.NewView(len(p.payload))
	v.Write(p.payload)
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: len(head) + int(route.MaxHeaderLength()), Payload: buffer.MakeWithView(v),
	})
	defer pkt.DecRef()
	h := pkt.TransportHeader().Push(len(head))
	copy(h, head)
	pkt.TransportProtocolNumber = tcpip.TransportProtocolNumber(p.proto)
	if p.virtio.Flags&l2.NeedsCsum != 0 {
		size := len(head) + len(p.payload)
		sum := ^checksum.Checksum(p.payload, checksum.Checksum(h, pseudoSum(from, to, p.proto, size)))
		if sum == 0 {
			sum = 0xffff // zero says that there is none (RFC 768)
		}
		binary.BigEndian.PutUint16(h[p.virtio.CsumOffset:], sum)
	}
	if err := route.WritePacket(stack.NetworkHeaderParams{Protocol: pkt.TransportProtocolNumber, TTL: hopsOut}, pkt); err != nil {
		n.link.lost.Add(1)
	}
}

// reassembledUDP takes a datagram that netstack has put together from fragments, or one for the gateway that Deliver knew no socket for:
// of that, netstack says that nobody listens. Its checksum may be left to us.
func (n *Network) reassembledUDP(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.UDP(pkt.TransportHeader().Slice())
	payload := pkt.Data().AsRange().ToSlice()
	from, to := netip.AddrPortFrom(toAddr(id.RemoteAddress), id.RemotePort), netip.AddrPortFrom(toAddr(id.LocalAddress), id.LocalPort)
	local := n.addresses.isLocal(to.Addr())
	if len(h) < udpLen || int(h.Length()) != udpLen+len(payload) || from.Port() == 0 || to.Port() == 0 || !n.summed(pkt, h, payload) {
		n.foreign.Add(1)
		return !local
	}
	if delivered := n.sockets.deliver(from, to, local, payload); delivered || local {
		return delivered
	}
	hops, ip := networkHeader(pkt)
	n.flows.UDP(from, to, hops, append(ip, h...), [][]byte{payload})
	return true
}

// summed verifies the checksum of a datagram.
func (n *Network) summed(pkt *stack.PacketBuffer, h header.UDP, payload []byte) bool {
	if h.Checksum() == 0 {
		return pkt.NetworkProtocolNumber == header.IPv4ProtocolNumber
	}
	src, dst := pkt.Network().SourceAddress(), pkt.Network().DestinationAddress()
	sum := pseudoSum(toAddr(src), toAddr(dst), protoUDP, len(h)+len(payload))
	return checksum.Checksum(payload, checksum.Checksum(h, sum)) == 0xffff
}

// reassembledEcho takes an ICMP message that netstack has put together from fragments, unless it is for the gateway itself; those that
// came whole are all for it. It reports what is for others as dealt with: netstack would answer an echo request by itself.
func (n *Network) reassembledEcho(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	dst := toAddr(id.LocalAddress)
	if n.addresses.isLocal(dst) {
		return false
	}
	request := byte(header.ICMPv6EchoRequest)
	if dst.Is4() {
		request = byte(header.ICMPv4Echo)
	}
	message := append(append([]byte(nil), pkt.TransportHeader().Slice()...), pkt.Data().AsRange().ToSlice()...)
	// netstack has verified the checksum of version 6 only.
	if len(message) < 8 || message[0] != request || message[1] != 0 || dst.Is4() && checksum.Checksum(message, 0) != 0xffff {
		return true
	}
	hops, ip := networkHeader(pkt)
	n.flows.Echo(toAddr(id.RemoteAddress), dst, hops, ip, message)
	return true
}

// networkHeader is a copy of the IP header, and the TTL or hop limit in it.
func networkHeader(pkt *stack.PacketBuffer) (hops uint8, ip []byte) {
	ip = append(ip, pkt.NetworkHeader().Slice()...)
	if pkt.NetworkProtocolNumber == header.IPv4ProtocolNumber {
		return header.IPv4(ip).TTL(), ip
	}
	return header.IPv6(ip).HopLimit(), ip
}
