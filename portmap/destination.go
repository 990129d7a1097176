package portmap

import (
	"encoding/binary"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// destination is the host address that a datagram came in for, told by IP_PKTINFO of ip(7) or by IPV6_PKTINFO of
// RFC 3542. A wildcard socket needs it: left alone, the kernel answers from whichever address the route to the
// client prefers, and the client drops answers from an address it did not speak to.
type destination struct {
	addr    netip.Addr
	ifindex uint32 // of a link-local address; otherwise 0, which leaves the choice to the routes
}

// askDestination makes the kernel tell the destination of every datagram that comes to fd, a socket of a's family.
func askDestination(fd int, a netip.Addr) error {
	if a.Is6() {
		return os.NewSyscallError("set IPV6_RECVPKTINFO", unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1))
	}
	return os.NewSyscallError("set IP_PKTINFO", unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_PKTINFO, 1))
}

// parseDestination reads the control messages of one datagram. ok is false for a broadcast or a multicast, which
// was not for us alone, and when no message tells the destination.
func parseDestination(oob []byte) (d destination, ok bool) {
	for len(oob) >= unix.SizeofCmsghdr {
		h, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return d, false
		}
		oob = rest
		switch {
		case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			// struct in_pktinfo: index, our address, the header's destination. They differ for a broadcast.
			ours, header := [4]byte(data[4:8]), [4]byte(data[8:12])
			return destination{addr: netip.AddrFrom4(ours)}, ours == header
		case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			// struct in6_pktinfo: the header's destination, index.
			d.addr = netip.AddrFrom16([16]byte(data[:16]))
			if d.addr.IsLinkLocalUnicast() {
				d.ifindex = binary.NativeEndian.Uint32(data[16:20])
			}
			return d, !d.addr.IsMulticast()
		}
	}
	return d, false
}

// control is the message that makes a datagram leave from d. It is nil for the zero destination: the socket has but
// one address then.
func (d destination) control() []byte {
	switch {
	case !d.addr.IsValid():
		return nil
	case d.addr.Is4():
		return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: d.addr.As4()})
	}
	return unix.PktInfo6(&unix.Inet6Pktinfo{Addr: d.addr.As16(), Ifindex: d.ifindex})
}

// segmentSize reads the control messages of a message that is several datagrams: it is how many bytes each has but for
// the last (UDP_GRO). 0: it is one.
func segmentSize(oob []byte) int {
	for len(oob) >= unix.SizeofCmsghdr {
		h, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return 0
		}
		if h.Level == unix.SOL_UDP && h.Type == unix.UDP_GRO && len(data) >= 4 {
			return max(int(int32(binary.NativeEndian.Uint32(data))), 0)
		}
		oob = rest
	}
	return 0
}
