package usermode

import (
	"net/netip"
	"slices"
)

// reserved are the addresses that mean something else on the host than in a container, or that no packet between two
// machines carries. The kernel connects 0.0.0.0 and :: to its own loopback, so they belong here too.
var reserved = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),          // this network, RFC 791
	netip.MustParsePrefix("127.0.0.0/8"),        // loopback, RFC 1122
	netip.MustParsePrefix("169.254.0.0/16"),     // link-local, RFC 3927, and the clouds' metadata service
	netip.MustParsePrefix("224.0.0.0/4"),        // multicast, RFC 1112
	netip.MustParsePrefix("255.255.255.255/32"), // limited broadcast, RFC 919
	netip.MustParsePrefix("::/128"),             // unspecified, RFC 4291
	netip.MustParsePrefix("::1/128"),            // loopback, RFC 4291
	netip.MustParsePrefix("fe80::/10"),          // link-local, RFC 4291
	netip.MustParsePrefix("ff00::/8"),           // multicast, RFC 4291
	netip.MustParsePrefix("fd00:ec2::254/128"),  // the IPv6 address of EC2's metadata service
}

// isReserved reports whether a has no place as one end of a flow between a container and the world. An IPv4-mapped
// address never has: a socket would read 127.0.0.1 out of ::ffff:127.0.0.1.
func isReserved(a netip.Addr) bool {
	return !a.IsValid() || a.Is4In6() || containedIn(reserved, a)
}

// containedIn reports whether one of the prefixes contains a, whatever its zone.
func containedIn(prefixes []netip.Prefix, a netip.Addr) bool {
	a = a.WithZone("")
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

// policy decides which addresses outside of a network its containers may reach.
type policy struct {
	own     []netip.Prefix        // the network's subnets, which the fabric's kernel routes
	blocked func(netip.Addr) bool // nil: nothing more
	host    func() netip.Addr     // nil: HostAlias is an address like others
}

// HostAlias is what rootless Podman writes into its containers' /etc/hosts as host.containers.internal: pasta makes it
// the host's own address (--map-guest-addr).
var HostAlias = netip.AddrFrom4([4]byte{169, 254, 1, 2})

// resolve returns the address that the host connects to when a container opens a flow to dst; false: the flow is
// refused.
func (p policy) resolve(dst netip.Addr) (netip.Addr, bool) {
	if dst == HostAlias && p.host != nil {
		host := p.host()
		return host, host.IsValid()
	}
	if isReserved(dst) || containedIn(p.own, dst) || p.blocked != nil && p.blocked(dst) {
		return netip.Addr{}, false
	}
	return dst, true
}
