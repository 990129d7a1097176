package vmnet

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/usernet/usernet/usermode/l2"
)

// guest is what is known of the machine at a port: or of several, if there is a switch behind it.
type guest struct {
	*Network
	port  *l2.Port
	first atomic.Pointer[netip.Addr] // its first address

	mu    sync.Mutex // Deliver has it: nobody else wants it until the port or the network ends
	now   time.Duration
	known map[netip.Addr]*station
	last  netip.Addr // the address that was sent from last
	its   *station
	flat  []byte           // a frame that came in pieces
	p     packet           // the frame
	burst [maxBurst][]byte // of datagrams, for flows
}

// Deliver takes frames of a machine's from the switch.
func (n *Network) Deliver(from *l2.Port, frames []l2.Frame) {
	g := n.guestOf(from)
	g.mu.Lock()
	defer g.mu.Unlock()
	if n.closed.Load() {
		return
	}
	g.now = n.now()
	for len(frames) > 0 {
		frames = frames[g.take(frames):]
	}
}

// await returns when nothing is being delivered of what was when it was called.
func (g *guest) await() {
	g.mu.Lock()
	defer g.mu.Unlock()
}

func (n *Network) guestOf(port *l2.Port) *guest {
	if g, ok := n.guests.Load(port); ok {
		return g.(*guest)
	}
	n.forgetGone()
	g, _ := n.guests.LoadOrStore(port, &guest{Network: n, port: port, known: make(map[netip.Addr]*station)})
	return g.(*guest)
}

// forgetGone forgets the machines whose ports have ended.
func (n *Network) forgetGone() {
	running := n.sw.Ports()
	n.guests.Range(func(port, v any) bool {
		if slices.Contains(running, port.(*l2.Port)) {
			return true
		}
		g := v.(*guest)
		g.mu.Lock()
		defer g.mu.Unlock()
		for a := range g.known {
			n.stations.forget(g, a)
		}
		n.guests.Delete(port)
		return true
	})
}

// take takes one frame, or several that are one for netstack, and returns how many.
func (g *guest) take(frames []l2.Frame) int {
	f := &frames[0]
	b := f.Head
	if len(f.Tail) > 0 {
		g.flat = append(g.flat[:0], f.Head...)
		for _, t := range f.Tail {
			g.flat = append(g.flat, t...)
		}
		b = g.flat
	}
	p := &g.p
	switch etherType := binary.BigEndian.Uint16(b[12:]); {
	case etherType == uint16(header.ARPProtocolNumber):
		g.arp(b)
	case etherType != uint16(header.IPv4ProtocolNumber) && etherType != uint16(header.IPv6ProtocolNumber), !p.decode(b):
		g.foreign.Add(1)
	case p.v4():
		return g.take4(frames)
	case g.router != nil:
		return g.take6(frames)
	default:
		g.foreign.Add(1)
	}
	return 1
}

// mac is the sender of a frame.
func macOf(frame []byte) l2.MAC { return l2.MAC(frame[6:12]) }

// has tells whether the machine may send from a.
func (g *guest) has(a netip.Addr, mac l2.MAC) bool {
	st := g.its
	if a != g.last || st == nil {
		st = g.known[a]
	}
	if st == nil || st.guest.Load() != g {
		if st = g.newStation(a, mac); st == nil {
			g.spoofed.Add(1)
			return false
		}
	}
	if v := pack(mac); st.mac.Load() != v {
		st.mac.Store(v)
	}
	if g.now-time.Duration(st.seen.Load()) > time.Second {
		st.seen.Store(int64(g.now))
	}
	g.last, g.its = a, st
	return true
}

func (g *guest) newStation(a netip.Addr, mac l2.MAC) *station {
	if g.addresses.own[a] || a == g.addresses.broadcast || a == g.addresses.subnet.Addr() ||
		!g.addresses.isInside(a) && !(a.Is6() && a.IsLinkLocalUnicast()) {
		return nil
	}
	st := g.stations.claim(g, a, mac)
	if st == nil {
		return nil
	}
	if g.known[a] == nil && len(g.known) == maxStations {
		g.forgetOldest()
	}
	g.known[a] = st
	if g.first.Load() == nil {
		g.first.Store(&a)
	}
	return st
}

// forgetOldest forgets the address that was not used for longest.
func (g *guest) forgetOldest() {
	var oldest netip.Addr
	for a, st := range g.known {
		if !oldest.IsValid() || st.seen.Load() < g.known[oldest].seen.Load() {
			oldest = a
		}
	}
	g.stations.forget(g, oldest)
	delete(g.known, oldest)
}

// arp gives netstack what is about the gateway: questions for its addresses, and answers to its own.
func (g *guest) arp(b []byte) {
	h := header.ARP(b[ethLen:])
	if len(h) < header.ARPSize || !h.IsValid() || l2.MAC(h.HardwareAddressSender()) != macOf(b) {
		g.foreign.Add(1)
		return
	}
	sender, target := netip.AddrFrom4([4]byte(h.ProtocolAddressSender())), netip.AddrFrom4([4]byte(h.ProtocolAddressTarget()))
	// Who has no address yet asks whether somebody else has it (RFC 5227).
	if !sender.IsUnspecified() && !g.has(sender, macOf(b)) {
		return
	}
	if g.addresses.own[target] {
		g.toStack(header.ARPProtocolNumber, b[:ethLen+header.ARPSize])
	}
}

// take4 is take for IPv4.
func (g *guest) take4(frames []l2.Frame) int {
	p, v := &g.p, frames[0].Virtio
	if p.src.IsUnspecified() || p.dst == broadcast4 || p.dst == g.addresses.broadcast {
		// Nothing else for everybody is for the gateway, or leaves the network.
		if payload, ok := p.udp(v); p.proto == protoUDP && !p.fragment && ok {
			g.askDHCP(payload)
		}
		return 1
	}
	if !g.has(p.src, macOf(p.frame)) || p.dst.IsMulticast() {
		return 1
	}
	if p.fragment {
		g.fragmentOf(p)
		return 1
	}
	switch p.proto {
	case protoTCP:
		return g.takeTCP(frames)
	case protoUDP:
		return g.takeUDP(frames)
	case protoICMP:
		g.takeICMP()
	default:
		g.foreign.Add(1)
	}
	return 1
}

var broadcast4 = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// fragmentOf has netstack put packets together again. What is whole then comes back by the handlers of transport protocols, or is TCP.
func (g *guest) fragmentOf(p *packet) {
	if p.v4() && p.proto != protoTCP && p.proto != protoUDP && p.proto != protoICMP {
		g.foreign.Add(1)
		return
	}
	g.toStack(protocolOf(p.src), p.frame)
}

// takeUDP takes a datagram: for a socket of the network's own, for the gateway, or for the world, with those that follow it there. It
// returns how many frames that was.
func (g *guest) takeUDP(frames []l2.Frame) int {
	p := &g.p
	payload, ok := p.udp(frames[0].Virtio)
	if !ok {
		g.foreign.Add(1)
		return 1
	}
	src, dst := p.ports()
	if dst == portDHCP && p.dst == g.addresses.gateway {
		g.askDHCP(payload)
		return 1
	}
	from, to := netip.AddrPortFrom(p.src, src), netip.AddrPortFrom(p.dst, dst)
	if g.sockets.deliver(from, to, g.addresses.isLocal(p.dst), payload) {
		return 1
	}
	if g.addresses.isLocal(p.dst) {
		g.toStack(protocolOf(p.src), p.frame) // which says that nobody listens
		return 1
	}
	hops, quoted := p.hops, p.frame[ethLen:p.l4+udpLen]
	burst := g.datagrams(append(g.burst[:0], payload), frames[1:])
	g.flows.UDP(from, to, hops, quoted, burst)
	clear(burst)
	return len(burst)
}

// takeICMP takes an echo request, or what a machine says about a packet that it got.
func (g *guest) takeICMP() {
	p := &g.p
	message, ok := p.icmp()
	if !ok {
		g.foreign.Add(1)
		return
	}
	request, unreachable, quote := byte(header.ICMPv4Echo), byte(header.ICMPv4DstUnreachable), 16
	if !p.v4() {
		request, unreachable, quote = byte(header.ICMPv6EchoRequest), byte(header.ICMPv6DstUnreachable), 24
	}
	switch {
	case message[0] == request && message[1] == 0:
		if g.addresses.isLocal(p.dst) {
			g.toStack(protocolOf(p.src), p.frame)
			return
		}
		g.flows.Echo(p.src, p.dst, p.hops, p.ip()[:p.l4-ethLen], message)
	case message[0] == unreachable:
		// Only about what was sent to itself: who is not the packet's addressee could disturb others' connections.
		quoted := message[8:]
		if n := len(p.src.AsSlice()); len(quoted) >= quote+n && string(quoted[quote:quote+n]) == string(p.src.AsSlice()) {
			g.sockets.unreachable(quoted)
			g.toStack(protocolOf(p.src), p.frame)
		}
	default:
		g.foreign.Add(1)
	}
}

// toStack gives netstack a copy of a frame.
func (g *guest) toStack(proto tcpip.NetworkProtocolNumber, frame []byte) {
	packet := frame[ethLen:]
	if len(packet) <= smallPacket {
		v := buffer.NewView(len(packet))
		v.Write(packet)
		g.toStackViews(proto, frame, v, nil)
		return
	}
	head, body := buffer.NewView(headersRoom), buffer.NewView(len(packet)-headersRoom)
	head.Write(packet[:headersRoom])
	body.Write(packet[headersRoom:])
	g.toStackViews(proto, frame, head, body)
}

const (
	// headersRoom is for all headers of a packet. netstack, when it looks at them while somebody else has the packet too, copies all of the
	// chunk that they are in; so it is one of their own.
	headersRoom = 128
	// smallPacket is the length up to which that is no matter.
	smallPacket = 512
)

// toStackViews gives netstack a packet, whose frame began as that one did, in one view or two.
func (g *guest) toStackViews(proto tcpip.NetworkProtocolNumber, frame []byte, head, body *buffer.View) {
	payload := buffer.MakeWithView(head)
	if body != nil {
		payload.Append(body)
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: payload})
	switch {
	case string(frame[:6]) == string(header.EthernetBroadcastAddress):
		pkt.PktType = tcpip.PacketBroadcast
	case frame[0]&1 != 0:
		pkt.PktType = tcpip.PacketMulticast
	}
	g.link.deliver(proto, pkt)
}
