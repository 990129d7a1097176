package publish

import (
	"net"
	"net/netip"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// destination finds out which address of the host a datagram came in for, which answers have to leave from: a client does not
// listen to another one. The zero value is of a socket that has but one, or a system that does not tell: there an answer leaves by
// whichever address leads to the client.
type destination struct{ v4, v6 bool }

func newDestination(conn *net.UDPConn) (d destination) {
	at := addrPort(conn.LocalAddr()).Addr()
	switch {
	case !at.IsUnspecified():
	case at.Is4():
		d.v4 = ipv4.NewPacketConn(conn).SetControlMessage(ipv4.FlagDst, true) == nil
	default:
		d.v6 = ipv6.NewPacketConn(conn).SetControlMessage(ipv6.FlagDst|ipv6.FlagInterface, true) == nil
	}
	return d
}

// parse reads the control messages of a datagram. ok is false if it was a broadcast or a multicast. A zero address: unknown.
func (d destination) parse(oob []byte) (local netip.Addr, ok bool) {
	switch {
	case d.v4:
		var cm ipv4.ControlMessage
		if err := cm.Parse(oob); err != nil {
			return netip.Addr{}, false
		}
		local, _ = netip.AddrFromSlice(cm.Dst.To4())
	case d.v6:
		var cm ipv6.ControlMessage
		if err := cm.Parse(oob); err != nil {
			return netip.Addr{}, false
		}
		local, _ = netip.AddrFromSlice(cm.Dst)
	}
	return local, !local.IsMulticast() && local != broadcast
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// control is the message that has a datagram leave from local; nil: from wherever.
func (d destination) control(local netip.Addr) []byte {
	switch {
	case !local.IsValid():
		return nil
	case d.v4:
		return (&ipv4.ControlMessage{Src: local.AsSlice()}).Marshal()
	case d.v6 && !local.IsLinkLocalUnicast(): // that one needs no help: it belongs to the client's link
		return (&ipv6.ControlMessage{Src: local.AsSlice()}).Marshal()
	}
	return nil
}
