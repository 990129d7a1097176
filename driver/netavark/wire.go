package netavark

import (
	"net"
	"net/netip"

	"go.podman.io/common/libnetwork/types"

	"github.com/usernet/usernet/driver/control"
)

// network is a network as Podman writes it down.
type network = types.Network

// exec is the input of setup and teardown: one container and one network. (NetworkPluginExec of netavark's
// src/network/types.rs; Podman's Go types have no such thing.)
type exec struct {
	ContainerID    string                  `json:"container_id"`
	ContainerName  string                  `json:"container_name"`
	PortMappings   []types.PortMapping     `json:"port_mappings"`
	Network        network                 `json:"network"`
	NetworkOptions types.PerNetworkOptions `json:"network_options"`
}

type info struct {
	Version    string `json:"version"`
	APIVersion string `json:"api_version"`
}

// prepared is net with what the daemon filled in.
func prepared(net network, got control.NetworkSpec) network {
	net.IPv6Enabled = got.IPv6
	options := got.Options
	for _, name := range ourOptions {
		if value, given := net.Options[name]; given {
			options[name] = value
		}
	}
	net.Options = options
	if len(net.Subnets) == 0 || len(net.Subnets) < len(got.Subnets) {
		// The chosen ones are behind those that were there, which keep their ranges.
		for _, s := range got.Subnets[len(net.Subnets):] {
			net.Subnets = append(net.Subnets, types.Subnet{Subnet: ipNet(s.Subnet)})
		}
	}
	return net
}

// status tells Podman what the container has.
func status(ifName string, got control.Attached) (types.StatusBlock, error) {
	mac, err := net.ParseMAC(got.MAC)
	if err != nil {
		return types.StatusBlock{}, err
	}
	ifc := types.NetInterface{MacAddress: types.HardwareAddr(mac)}
	for _, a := range got.Addresses {
		na := types.NetAddress{IPNet: ipNet(a.Address)}
		if a.Gateway.IsValid() {
			na.Gateway = a.Gateway.AsSlice()
		}
		ifc.Subnets = append(ifc.Subnets, na)
	}
	sb := types.StatusBlock{Interfaces: map[string]types.NetInterface{ifName: ifc}, DNSSearchDomains: got.Search}
	for _, a := range got.DNS {
		sb.DNSServerIPs = append(sb.DNSServerIPs, a.AsSlice())
	}
	return sb, nil
}

func ipNet(p netip.Prefix) types.IPNet {
	return types.IPNet{IPNet: net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
}

// prefix is zero for what is no subnet.
func prefix(n types.IPNet) netip.Prefix {
	a, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if !ok || bits == 0 {
		return netip.Prefix{}
	}
	if a = a.Unmap(); bits != a.BitLen() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, ones)
}

// addr is zero for a nil IP.
func addr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
