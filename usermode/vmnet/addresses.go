package vmnet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/usernet/usernet/usermode/l2"
)

// addresses says whose an address is, and which ones machines may reach.
type addresses struct {
	subnet, subnet6   netip.Prefix
	gateway, gateway6 netip.Addr
	broadcast         netip.Addr // of subnet
	linkLocal6        netip.Addr // the gateway's; not valid without IPv6
	list              []netip.Addr
	own               map[netip.Addr]bool // the gateway's, NAT's included
	nat               map[netip.Addr]netip.Addr
	metadata          bool // link-local addresses may be dialled
}

func newAddresses(cfg Config) (addresses, error) {
	a := addresses{
		subnet: cfg.Subnet.Masked(), subnet6: cfg.Subnet6.Masked(), gateway: cfg.Gateway, gateway6: cfg.Gateway6,
		own: make(map[netip.Addr]bool), nat: cfg.NAT, metadata: cfg.LinkLocal,
	}
	if cfg.MTU < 1280 || cfg.MTU > 65535 {
		return a, fmt.Errorf("MTU %d is not between 1280 and 65535", cfg.MTU)
	}
	if cfg.MAC == (l2.MAC{}) || cfg.MAC[0]&1 != 0 {
		return a, fmt.Errorf("%s is no address of one machine", cfg.MAC)
	}
	if !a.subnet.IsValid() || !a.subnet.Addr().Is4() || a.subnet.Bits() > 30 {
		return a, fmt.Errorf("subnet %s: want one of IPv4 with room for two machines", cfg.Subnet)
	}
	a.broadcast = lastOf(a.subnet)
	own := []netip.Addr{cfg.Gateway}
	if cfg.Subnet6.IsValid() {
		if !a.subnet6.Addr().Is6() || a.subnet6.Bits() != 64 {
			return a, fmt.Errorf("subnet %s: want one of IPv6 with 64 bits", cfg.Subnet6)
		}
		a.linkLocal6 = linkLocalOf(cfg.MAC)
		own = append(own, cfg.Gateway6, a.linkLocal6)
	} else if cfg.Gateway6.IsValid() {
		return a, errors.New("a gateway of IPv6 without a subnet")
	}
	own = append(own, cfg.VirtualIPs...)
	for from, to := range cfg.NAT {
		if !to.IsValid() || to.IsUnspecified() || to.IsMulticast() {
			return a, fmt.Errorf("NAT of %s: %s cannot be dialled", from, to)
		}
		own = append(own, from)
	}
	for _, addr := range own {
		if addr != a.linkLocal6 && (!a.isInside(addr) || addr == a.broadcast || addr == a.subnet.Addr()) {
			return a, fmt.Errorf("address %s is not one of %s or %s for a machine", addr, a.subnet, cfg.Subnet6)
		}
		if !a.own[addr] {
			a.list = append(a.list, addr)
		}
		a.own[addr] = true
	}
	return a, nil
}

// lastOf is the last address of a prefix of IPv4.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}

// linkLocalOf makes the link-local address of an interface (RFC 4291, appendix A).
func linkLocalOf(m l2.MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]})
}

// isInside tells whether a is of the network's subnets.
func (a *addresses) isInside(addr netip.Addr) bool {
	return a.subnet.Contains(addr) || a.subnet6.Contains(addr)
}

// isLocal tells whether what is sent to addr is for the gateway itself.
func (a *addresses) isLocal(addr netip.Addr) bool {
	if !a.own[addr] {
		return false
	}
	_, translated := a.nat[addr]
	return !translated
}

// local are the addresses at which the gateway's services are.
func (a *addresses) local() []netip.Addr {
	return slices.DeleteFunc(slices.Clone(a.list), func(addr netip.Addr) bool { return !a.isLocal(addr) })
}

// gatewayFor is the gateway's address in the family of addr.
func (a *addresses) gatewayFor(addr netip.Addr) netip.Addr {
	switch {
	case addr.Is4():
		return a.gateway
	case addr.IsLinkLocalUnicast():
		return a.linkLocal6
	}
	return a.gateway6
}

// reserved are the addresses that mean something else on the host than in a machine, or that no packet between two
// machines carries. The kernel connects 0.0.0.0 and :: to its own loopback, so they belong here too.
var reserved = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),          // this network, RFC 791
	netip.MustParsePrefix("127.0.0.0/8"),        // loopback, RFC 1122
	netip.MustParsePrefix("224.0.0.0/4"),        // multicast, RFC 1112
	netip.MustParsePrefix("255.255.255.255/32"), // limited broadcast, RFC 919
	netip.MustParsePrefix("::/128"),             // unspecified, RFC 4291
	netip.MustParsePrefix("::1/128"),            // loopback, RFC 4291
	netip.MustParsePrefix("fe80::/10"),          // link-local, RFC 4291
	netip.MustParsePrefix("ff00::/8"),           // multicast, RFC 4291
}

// metadata is where clouds tell machines their secrets.
var metadata = []netip.Prefix{
	netip.MustParsePrefix("169.254.0.0/16"),    // link-local, RFC 3927
	netip.MustParsePrefix("fd00:ec2::254/128"), // EC2's, by IPv6
}

// contains reports whether one of the prefixes contains addr. An IPv4-mapped address is in all of them: a socket would read 127.0.0.1
// out of ::ffff:127.0.0.1.
func contains(prefixes []netip.Prefix, addr netip.Addr) bool {
	return !addr.IsValid() || addr.Is4In6() ||
		slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// resolve returns the address that the host dials when a machine dials dst; false: it is refused.
func (a *addresses) resolve(dst netip.Addr) (netip.Addr, bool) {
	if to, ok := a.nat[dst]; ok {
		return to, true
	}
	if a.own[dst] || a.isInside(dst) || contains(reserved, dst) || !a.metadata && contains(metadata, dst) {
		return netip.Addr{}, false
	}
	return dst, true
}

// stands tells whether a machine at to may see client as who it is talking to.
func (a *addresses) stands(client, to netip.Addr) bool {
	return client.IsValid() && client.Is4() == to.Is4() && !a.isInside(client) && !contains(reserved, client) && !contains(metadata, client)
}
