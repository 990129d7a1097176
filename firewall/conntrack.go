package firewall

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/usernet/usernet"
)

// FlushUDP forgets the UDP conversations with the host ports of forwards. The kernel looks at the DNAT rules only for
// the first packet of a conversation, and a UDP client that keeps its port keeps the conversation alive: without this it
// would go on talking to the container that had the port before, or to the host. Call it after Set, with the
// forwards that came and those that went; their Target does not matter. Forwards of other protocols are ignored; a
// kernel without connection tracking has nothing to forget.
func FlushUDP(forwards []Forward) error {
	for _, v6 := range []bool{false, true} {
		m := udpMatch{}
		for _, f := range forwards {
			if f.Proto == usernet.UDP && (!f.HostIP.IsValid() || f.HostIP.Is6() == v6) {
				m.ports = append(m.ports, f)
			}
		}
		if len(m.ports) == 0 {
			continue
		}
		if err := m.flush(v6); err != nil {
			return fmt.Errorf("forget UDP conversations with published ports: %w", err)
		}
	}
	return nil
}

// udpMatch selects the conntrack entries whose first packet went to one of the ports on an address of the host's. Packets
// to the same port elsewhere, such as every container's DNS query where 53 is published, are none of its business.
type udpMatch struct {
	ports []Forward
	own   map[netip.Addr]bool
}

func (m udpMatch) flush(v6 bool) error {
	family := netlink.InetFamily(unix.AF_INET)
	if v6 {
		family = unix.AF_INET6
	}
	addrs, err := netlink.AddrList(nil, int(family))
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("list addresses: %w", err)
	}
	m.own = map[netip.Addr]bool{}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			m.own[ip.Unmap()] = true
		}
	}
	_, err = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, m)
	switch {
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return nil // no connection tracking in this kernel
	case errors.Is(err, netlink.ErrDumpInterrupted):
		return nil // the table was resized meanwhile; trying again would promise no more
	}
	return err
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (m udpMatch) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	if flow.Forward.Protocol != unix.IPPROTO_UDP {
		return false
	}
	dst, _ := netip.AddrFromSlice(flow.Forward.DstIP)
	dst = dst.Unmap()
	for _, f := range m.ports {
		any := !f.HostIP.IsValid() || f.HostIP.IsUnspecified()
		if flow.Forward.DstPort == f.HostPort && (any && m.own[dst] || f.HostIP == dst) {
			return true
		}
	}
	return false
}
