package hostnet

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet/internal/dump"
)

// Routed lists the IPv4 destinations that the calling thread's namespace has a route for, without the default route.
func Routed() ([]netip.Prefix, error) {
	routes, err := dump.Whole(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var ps []netip.Prefix
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		a, ok := netip.AddrFromSlice(r.Dst.IP.To4())
		if bits, _ := r.Dst.Mask.Size(); ok && bits > 0 {
			ps = append(ps, netip.PrefixFrom(a, bits))
		}
	}
	return ps, nil
}
