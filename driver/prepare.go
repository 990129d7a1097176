package driver

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/netip"
	"slices"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/internal/hostnet"
	"github.com/usernet/usernet/ipam"
)

// PrepareNetwork checks a network that an engine is about to write down and chooses the subnets that it leaves open. taken
// are those of networks that are not known here. Nothing is made: Attach will do that.
func (d *Driver) PrepareNetwork(_ context.Context, want usernet.Network, taken []netip.Prefix) (usernet.Network, error) {
	used, err := hostnet.Routed()
	if err != nil {
		return want, err
	}
	want.Subnets = slices.Clone(want.Subnets)
	for _, n := range d.all() {
		if err := conflict(want, n.Network); err != nil && n.ID != want.ID {
			return want, err
		}
		for _, s := range n.Subnets {
			used = append(used, s.Prefix)
		}
	}
	for _, s := range want.Subnets {
		for _, p := range taken {
			if want.Options.Mode == usernet.Bridge && s.Prefix.Overlaps(p) {
				return want, fmt.Errorf("%w: the subnet %s overlaps %s of another network", usernet.ErrExists, s.Prefix, p)
			}
		}
	}
	if len(want.Subnets) == 0 && !want.Unaddressed {
		s, err := ipam.Subnet4(append(used, taken...))
		if err != nil {
			return want, err
		}
		want.Subnets = append(want.Subnets, s)
	}
	if want.IPv6 && !slices.ContainsFunc(want.Subnets, func(s usernet.Subnet) bool { return s.Prefix.Addr().Is6() }) {
		want.Subnets = append(want.Subnets, uniqueLocal())
	}
	return want, d.check(want)
}

// uniqueLocal is an IPv6 subnet with a random global ID (RFC 4193, section 3.2).
func uniqueLocal() usernet.Subnet {
	a := [16]byte{0: 0xfd}
	rand.Read(a[1:6])
	p := netip.PrefixFrom(netip.AddrFrom16(a), 64)
	return usernet.Subnet{Prefix: p, Gateway: p.Addr().Next()}
}
