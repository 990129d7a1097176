package vmnet

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/usernet/usernet/usermode/dhcp"
	"github.com/usernet/usernet/usermode/l2"
)

// take6 is take for IPv6.
func (g *guest) take6(frames []l2.Frame) int {
	p, v := &g.p, frames[0].Virtio
	if p.proto == protoICMPv6 && !p.fragment {
		g.takeICMPv6()
		return 1
	}
	if !g.has(p.src, macOf(p.frame)) {
		return 1
	}
	if p.proto == protoUDP {
		if payload, ok := p.udp(v); ok {
			if _, dst := p.ports(); dst == portDHCPv6 && (p.dst == allDHCPv6 || g.addresses.own[p.dst]) {
				g.askDHCPv6(payload)
				return 1
			}
		}
	}
	if p.dst.IsMulticast() {
		return 1
	}
	switch p.proto {
	case protoFragment:
		g.fragmentOf(p)
	case protoTCP:
		return g.takeTCP(frames)
	case protoUDP:
		return g.takeUDP(frames)
	default:
		g.foreign.Add(1)
	}
	return 1
}

// takeICMPv6 takes neighbour discovery as far as it is about the gateway, and the rest as takeICMP does.
func (g *guest) takeICMPv6() {
	p := &g.p
	message, ok := p.icmp()
	if !ok {
		g.foreign.Add(1)
		return
	}
	mac := macOf(p.frame)
	// Who has no address yet asks whether somebody else has it, and for a router (RFC 4862, 5.4; RFC 4861, 6.3.7).
	if !p.src.IsUnspecified() && !g.has(p.src, mac) {
		return
	}
	switch header.ICMPv6Type(message[0]) {
	case header.ICMPv6RouterSolicit:
		g.askRouter(mac)
	case header.ICMPv6NeighborSolicit:
		if len(message) >= 24 && g.addresses.own[netip.AddrFrom16([16]byte(message[8:24]))] {
			g.toStack(header.IPv6ProtocolNumber, p.frame)
		}
	case header.ICMPv6NeighborAdvert:
		// Only about itself.
		if len(message) >= 24 && g.has(netip.AddrFrom16([16]byte(message[8:24])), mac) {
			g.toStack(header.IPv6ProtocolNumber, p.frame)
		}
	default:
		if !p.dst.IsMulticast() && !p.src.IsUnspecified() {
			g.takeICMP()
		}
	}
}

// askRouter answers a router solicitation.
func (g *guest) askRouter(mac l2.MAC) {
	if g.p.hops != header.NDPHopLimit {
		return // it is not from this link
	}
	to := g.p.src
	if to.IsUnspecified() {
		to = dhcp.AllNodes
	}
	frame := g.router.Advertisement(mac, to)
	copy(frame, mac[:]) // a group of one: what one machine asks is no reason to wake the others
	g.sw.Send([]l2.Frame{{Head: frame}})
}

// askDHCPv6 answers a message of DHCPv6.
func (g *guest) askDHCPv6(message []byte) {
	answer, ok := g.router.Answer(message)
	if !ok {
		return
	}
	src, _ := g.p.ports()
	g.sendUDP(netip.AddrPortFrom(g.addresses.gatewayFor(g.p.src), portDHCPv6), netip.AddrPortFrom(g.p.src, src), [][]byte{answer})
}
