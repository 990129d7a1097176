package vmnet

import (
	"fmt"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/usernet/usernet/usermode/tcprelay"
)

// nicID is the one NIC of a network's stack.
const nicID tcpip.NICID = 1

// newStack makes the netstack of a network. It starts goroutines; Close and Wait end them.
func newStack(l *link, a addresses) (_ *stack.Stack, err error) {
	// It accepts connections to any address. Deliver sees to it that netstack gets to see nothing by which it would claim an address
	// that is not its own: solicitations and ARP for others' addresses, echo requests to them.
	st, err := tcprelay.NewStack(nicID, l, arp.NewProtocol)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			st.Close()
			st.Wait()
		}
	}()
	for _, addr := range a.list {
		if err := addAddress(st, addr); err != nil {
			return nil, err
		}
	}
	// For the router flag in neighbour advertisements: without it, machines drop the gateway from their routers as soon as they ask
	// whether it is still there (RFC 4861, 7.2.5). Nothing is forwarded: in promiscuous mode, all is for the stack.
	if _, err := st.SetNICForwarding(nicID, header.IPv6ProtocolNumber, true); err != nil {
		return nil, fmt.Errorf("netstack: be a router: %s", err)
	}
	st.SetRouteTable(routes(a))
	return st, nil
}

func addAddress(st *stack.Stack, addr netip.Addr) error {
	pa := tcpip.ProtocolAddress{Protocol: protocolOf(addr), AddressWithPrefix: fromAddr(addr).WithPrefix()}
	if err := st.AddProtocolAddress(nicID, pa, stack.AddressProperties{}); err != nil {
		return fmt.Errorf("netstack: add address %s: %s", addr, err)
	}
	return nil
}

// routes are those of the subnets: machines are neighbours, and there is no other way to anybody.
func routes(a addresses) []tcpip.Route {
	rs := []tcpip.Route{
		{Destination: subnetOf(a.subnet), NIC: nicID},
		{Destination: header.IPv4Broadcast.WithPrefix().Subnet(), NIC: nicID},
	}
	if a.subnet6.IsValid() {
		rs = append(rs,
			tcpip.Route{Destination: subnetOf(a.subnet6), NIC: nicID},
			tcpip.Route{Destination: header.IPv6LinkLocalPrefix.Subnet(), NIC: nicID},
			tcpip.Route{Destination: subnetOf(netip.MustParsePrefix("ff00::/8")), NIC: nicID})
	}
	return rs
}

func subnetOf(p netip.Prefix) tcpip.Subnet {
	return tcpip.AddressWithPrefix{Address: fromAddr(p.Addr()), PrefixLen: p.Bits()}.Subnet()
}

// setHandlers says who gets what belongs to no endpoint of netstack.
func (n *Network) setHandlers() {
	n.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, n.relays.HandlePacket)
	n.stack.SetTransportProtocolHandler(udp.ProtocolNumber, n.reassembledUDP)
	n.stack.SetTransportProtocolHandler(icmp.ProtocolNumber4, n.reassembledEcho)
	n.stack.SetTransportProtocolHandler(icmp.ProtocolNumber6, n.reassembledEcho)
}

func fromAddr(a netip.Addr) tcpip.Address {
	if a.Is4() {
		return tcpip.AddrFrom4(a.As4())
	}
	return tcpip.AddrFrom16(a.As16())
}

func toAddr(a tcpip.Address) netip.Addr {
	if a.Len() == header.IPv4AddressSize {
		return netip.AddrFrom4(a.As4())
	}
	return netip.AddrFrom16(a.As16())
}

func protocolOf(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}
