package portmap

import (
	"context"
	"net"
	"net/netip"
)

// Host is the Dialer for containers that this process's own network namespace has a route to. It uses ordinary
// sockets, so the container sees an address of the host, such as its bridge's, in place of the client's.
type Host struct{}

// DialTCP connects to target.
func (Host) DialTCP(ctx context.Context, _, target netip.AddrPort) (*net.TCPConn, error) {
	var d net.Dialer
	d.SetMultipathTCP(false) // splice(2) does not work on an MPTCP socket
	return d.DialTCP(ctx, "tcp", netip.AddrPort{}, target)
}

// DialUDP connects a socket to target; no packet is sent.
func (Host) DialUDP(_, target netip.AddrPort) (*net.UDPConn, error) {
	return net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(target))
}
