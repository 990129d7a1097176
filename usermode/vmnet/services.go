package vmnet

import (
	"context"
	"net/netip"
	"time"

	"github.com/usernet/usernet/usermode/dhcp"
	"github.com/usernet/usernet/usermode/l2"
)

const (
	portDHCP, portDHCPClient = 67, 68
	portDHCPv6               = 547

	// advertiseEvery is far less than what is advertised lasts, and MaxRtrAdvInterval of RFC 4861, 6.2.1 at most.
	advertiseEvery = 5 * time.Minute
)

// allDHCPv6 is the group of DHCPv6 servers on a link (RFC 8415, 7.1).
var allDHCPv6 = netip.MustParseAddr("ff02::1:2")

// newServices makes what tells machines their addresses.
func (n *Network) newServices() (err error) {
	a := &n.addresses
	var dns4, dns6 []netip.Addr
	for _, d := range n.cfg.DNS {
		if d.Is4() {
			dns4 = append(dns4, d)
		} else {
			dns6 = append(dns6, d)
		}
	}
	leases := make(map[netip.Addr]dhcp.MAC, len(n.cfg.Leases))
	for addr, mac := range n.cfg.Leases {
		leases[addr] = dhcp.MAC(mac)
	}
	n.dhcp, err = dhcp.New(dhcp.Config{
		Subnet: a.subnet, Gateway: a.gateway, DNS: dns4, Search: n.cfg.Search, MTU: n.cfg.MTU,
		Static: leases, Reserved: a.list, Log: n.cfg.Log,
	})
	if err != nil || !a.subnet6.IsValid() {
		return err
	}
	if n.cfg.DNS == nil {
		dns6 = []netip.Addr{a.gateway6}
	}
	n.router = &dhcp.Router{
		MAC: dhcp.MAC(n.cfg.MAC), Addr: a.linkLocal6, Prefix: a.subnet6, MTU: n.cfg.MTU, DNS: dns6, Search: n.cfg.Search,
	}
	return nil
}

// advertise tells the machines about the router from time to time, until ctx is done.
func (n *Network) advertise(ctx context.Context) {
	if n.router == nil {
		return
	}
	tick := time.NewTicker(advertiseEvery)
	defer tick.Stop()
	for {
		n.sw.Send([]l2.Frame{{Head: n.router.Advertisement(dhcp.MAC{}, dhcp.AllNodes)}})
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// askDHCP answers a DHCP message.
func (g *guest) askDHCP(message []byte) {
	src, dst := g.p.ports()
	if src != portDHCPClient || dst != portDHCP {
		return
	}
	answer, ok := g.dhcp.Answer(message, g.port.ID)
	if !ok {
		return
	}
	// To the machine's own Ethernet address even if it has no other yet and asked for a broadcast: nobody else is to be woken.
	mac := l2.MAC(answer.MAC)
	if a, ok := given(answer.Message); ok {
		g.stations.assign(g, a, mac)
	}
	g.sendUDPTo(mac, netip.AddrPortFrom(g.addresses.gateway, portDHCP), answer.To, [][]byte{answer.Message})
}

// given returns the address that an acknowledgement gives.
func given(answer []byte) (netip.Addr, bool) {
	const yiaddr, options, typeACK = 16, 240, 5
	if len(answer) < options+3 {
		return netip.Addr{}, false
	}
	for o := answer[options:]; len(o) > 2 && o[0] != 255; {
		if o[0] == 53 {
			a := netip.AddrFrom4([4]byte(answer[yiaddr:]))
			return a, o[2] == typeACK && !a.IsUnspecified()
		}
		if o[0] == 0 {
			o = o[1:]
			continue
		}
		o = o[min(len(o), 2+int(o[1])):]
	}
	return netip.Addr{}, false
}
