package cni

import (
	"encoding/json"
	"net"
	"net/netip"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/usernet/usernet/driver/control"
)

// take puts an IPAM plugin's result in a request. The network has the subnets that the plugin's configuration tells of, so that
// it is the same one for every container, and those of the addresses.
func (w wire) take(result *types100.Result, req *control.AttachRequest) error {
	if w.Subnet != "" || len(w.Subnets) > 0 {
		return invalid("subnets are given, and an IPAM plugin as well: %s has subnets of its own", w.ipam())
	}
	if len(result.IPs) == 0 {
		return invalid("ipam %s: it gave no address", w.ipam())
	}
	req.Network.Subnets = w.ipamSubnets()
	for _, ip := range result.IPs {
		p := prefix(ip.Address)
		if !p.IsValid() {
			return invalid("ipam %s: it gave %s, which is no address", w.ipam(), ip.Address.String())
		}
		req.Addresses = append(req.Addresses, p.Addr())
		add(&req.Network.Subnets, p, addr(ip.Gateway))
	}
	return routes(w, result.Routes, req)
}

// ipamSubnets are the subnets that host-local and static are configured with.
func (w wire) ipamSubnets() []control.Subnet {
	var c struct {
		addressRange                  // host-local's old form
		Ranges       [][]addressRange `json:"ranges"` // host-local
		Addresses    []struct {       // static
			Address string `json:"address"`
			Gateway string `json:"gateway"`
		} `json:"addresses"`
	}
	if json.Unmarshal(w.IPAM, &c) != nil {
		return nil // the plugin has understood what it needs
	}
	var list []control.Subnet
	for _, set := range slices.Concat(w.Runtime.IPRanges, [][]addressRange{{c.addressRange}}, c.Ranges) {
		for _, r := range set {
			if s, err := r.value(); err == nil {
				add(&list, s.Subnet, s.Gateway)
			}
		}
	}
	for _, a := range c.Addresses {
		p, err := netip.ParsePrefix(a.Address)
		gw, _ := netip.ParseAddr(a.Gateway)
		if err == nil {
			add(&list, p, gw)
		}
	}
	return list
}

// add adds the subnet of an address, if it is not there. A subnet without a gateway gets its first address as one, as from
// the official bridge plugin.
func add(list *[]control.Subnet, p netip.Prefix, gateway netip.Addr) {
	p = p.Masked()
	for _, s := range *list {
		if s.Subnet == p {
			return
		}
	}
	if !gateway.IsValid() {
		gateway = p.Addr().Next()
	}
	*list = append(*list, control.Subnet{Subnet: p, Gateway: gateway})
}

// routes puts an IPAM plugin's routes in a request. Default routes by the network's gateway are made anyway, unless the
// configuration does not want them; those that the plugin asks for are then the only ones.
func routes(w wire, list []*types.Route, req *control.AttachRequest) error {
	for _, r := range list {
		if r.MTU != 0 || r.AdvMSS != 0 || r.Table != nil || r.Scope != nil {
			return invalid("route to %s: mtu, advmss, table and scope are not supported", r.Dst.String())
		}
		route := control.Route{Destination: prefix(r.Dst), NextHop: addr(r.GW), Metric: r.Priority}
		if !route.Destination.IsValid() {
			return invalid("route to %s: want a subnet", r.Dst.String())
		}
		gateway := gatewayOf(req, route.Destination.Addr().Is4())
		if !route.NextHop.IsValid() {
			route.NextHop = gateway
		}
		if !route.NextHop.IsValid() {
			return invalid("route to %s: there is no gateway of that family", r.Dst.String())
		}
		if route.Destination.Bits() == 0 && !req.NoDefault && route.NextHop == gateway && route.Metric == 0 {
			continue
		}
		req.Routes = append(req.Routes, route)
	}
	onlyOwnDefaults(req)
	return nil
}

// onlyOwnDefaults sees that a default route that was asked for is the container's only one of its family.
func onlyOwnDefaults(req *control.AttachRequest) {
	asked := map[bool]bool{} // by whether it is IPv4's
	for _, r := range req.Routes {
		if r.Destination.Bits() == 0 {
			asked[r.Destination.Addr().Is4()] = true
		}
	}
	if len(asked) == 0 || req.NoDefault {
		return
	}
	req.NoDefault = true
	for _, is4 := range []bool{true, false} {
		if gateway := gatewayOf(req, is4); !asked[is4] && gateway.IsValid() {
			req.Routes = append(req.Routes, control.Route{Destination: netip.PrefixFrom(zero(is4), 0), NextHop: gateway})
		}
	}
}

// gatewayOf is the gateway of the container's first address of a family.
func gatewayOf(req *control.AttachRequest, is4 bool) netip.Addr {
	for _, a := range req.Addresses {
		if a.Is4() != is4 {
			continue
		}
		for _, s := range req.Network.Subnets {
			if s.Subnet.Contains(a) {
				return s.Gateway
			}
		}
	}
	return netip.Addr{}
}

func zero(is4 bool) netip.Addr {
	if is4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// prefix is zero for what is no subnet.
func prefix(n net.IPNet) netip.Prefix {
	a := addr(n.IP)
	ones, bits := n.Mask.Size()
	if bits != a.BitLen() && bits != 128 || bits == 0 || !a.IsValid() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, ones-(bits-a.BitLen()))
}

// addr is zero for a nil IP.
func addr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

func ipNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
