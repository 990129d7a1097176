package tcprelay

import (
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// Opens is to be called with the addresses of a SYN, before netstack gets it. If a client takes a port again whose last connection is in
// TIME-WAIT here, that ends, and the SYN opens a new one (RFC 9293, 3.6.1). netstack would do so for a listener; to what a
// forwarder accepts it does not answer until TIME-WAIT is over, and the client would lose a second or more. On a link
// that keeps the order of packets no SYN is an old duplicate.
func (t *Relays) Opens(client, dst netip.AddrPort) {
	id := stack.TransportEndpointID{
		LocalAddress: tcpip.AddrFromSlice(dst.Addr().AsSlice()), LocalPort: dst.Port(),
		RemoteAddress: tcpip.AddrFromSlice(client.Addr().AsSlice()), RemotePort: client.Port(),
	}
	ep, ok := t.find(id).(*tcp.Endpoint)
	if !ok || tcp.EndpointState(ep.State()) != tcp.StateTimeWait {
		return
	}
	if _, used := t.used.Load(ep); used {
		return // its relay has not delivered everything yet
	}
	ep.Abort()
}

// find returns the endpoint of a connection, or nil.
func (t *Relays) find(id stack.TransportEndpointID) stack.TransportEndpoint {
	proto := header.IPv6ProtocolNumber
	if id.LocalAddress.Len() == header.IPv4AddressSize {
		proto = header.IPv4ProtocolNumber
	}
	return t.stack.FindTransportEndpoint(proto, tcp.ProtocolNumber, id, t.cfg.NIC)
}
