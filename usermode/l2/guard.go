package l2

import (
	"net/netip"
)

// guard stops what a machine says to others in the gateway's place: that it has the gateway's addresses (ARP, neighbour
// advertisements), that it is a router (advertisements, redirects), or answers of a DHCP server.
type guard struct {
	v4 map[[4]byte]bool
	v6 map[[16]byte]bool
}

func newGuard(addrs []netip.Addr) guard {
	g := guard{make(map[[4]byte]bool), make(map[[16]byte]bool)}
	for _, a := range addrs {
		if a.Is4() {
			g.v4[a.As4()] = true
		} else {
			g.v6[a.As16()] = true
		}
	}
	return g
}

const (
	icmp6RouterAdvertisement    = 134
	icmp6NeighbourAdvertisement = 136
	icmp6Redirect               = 137

	portDHCPServer, portDHCPClient     = 67, 68
	portDHCPv6Server, portDHCPv6Client = 547, 546
)

// stops tells whether f must not come to other machines. Without addresses to guard nothing is stopped. Extension headers and fragments are not
// looked behind; hosts do not take neighbour discovery from fragments either (RFC 6980).
func (g guard) stops(f *Frame) bool {
	if len(g.v4)+len(g.v6) == 0 {
		return false
	}
	etherType, at := f.layer3()
	b := f.Head[at:]
	switch etherType {
	case etherARP: // hardware type and length, protocol type and length, operation; sender's MAC, sender's address
		return len(b) >= 18 && g.v4[[4]byte(b[14:18])]
	case etherIPv4:
		if len(b) < 20 || b[9] != protoUDP {
			return false
		}
		return fromServer(b[min(len(b), 4*int(b[0]&15)):], portDHCPServer, portDHCPClient)
	case etherIPv6:
		if len(b) < 40 {
			return false
		}
		switch b[6] {
		case protoUDP:
			return fromServer(b[40:], portDHCPv6Server, portDHCPv6Client)
		case protoICMPv6:
			return g.stopsICMPv6(b[40:])
		}
	}
	return false
}

func (g guard) stopsICMPv6(b []byte) bool {
	if len(b) == 0 {
		return false
	}
	switch b[0] {
	case icmp6RouterAdvertisement, icmp6Redirect:
		return true
	case icmp6NeighbourAdvertisement: // type, code, checksum, flags, target
		return len(b) >= 24 && g.v6[[16]byte(b[8:24])]
	}
	return false
}

func fromServer(udp []byte, server, client uint16) bool {
	return len(udp) >= 4 && uint16(udp[0])<<8|uint16(udp[1]) == server && uint16(udp[2])<<8|uint16(udp[3]) == client
}
