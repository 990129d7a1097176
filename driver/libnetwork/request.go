package libnetwork

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/config"
)

// The options that mean something to us (moby/moby, daemon/libnetwork/netlabel).
const (
	optGeneric    = "com.docker.network.generic"
	optEnableIPv4 = "com.docker.network.enable_ipv4"
	optEnableIPv6 = "com.docker.network.enable_ipv6"
	optInternal   = "com.docker.network.internal"
	optPortMap    = "com.docker.network.portmap"
	optIfName     = "com.docker.network.endpoint.ifname"
	optNo6To4     = "com.docker.network.driver.private.no_proxy_6to4"
)

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w "+format, append([]any{usernet.ErrInvalid}, args...)...)
}

// value decodes the option called name into a T. Missing and null are T's zero value.
func value[T any](o Options, name string) (v T, err error) {
	raw, given := o[name]
	if !given {
		return v, nil
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		return v, invalid("option %s: %w", name, err)
	}
	return v, nil
}

// flag is value for a bool that is def when it is not given.
func flag(o Options, name string, def bool) (bool, error) {
	v, err := value[*bool](o, name)
	if err != nil || v == nil {
		return def, err
	}
	return *v, nil
}

// checkID refuses what no engine would use as an ID: IDs become parts of file and link names.
func checkID(what, id string) error {
	ok := len(id) >= 1 && len(id) <= 128 && id != "." && id != ".."
	for i := 0; ok && i < len(id); i++ {
		c := id[i]
		ok = '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || strings.IndexByte("_.-", c) >= 0
	}
	if !ok {
		return invalid("%s ID %.64q: want 1 to 128 letters, digits or one of _.-", what, id)
	}
	return nil
}

func checkIDs(networkID, endpointID string) error {
	if err := checkID("network", networkID); err != nil {
		return err
	}
	return checkID("endpoint", endpointID)
}

// networkOf reads a request for a network, with the daemon's default options below the request's own.
func networkOf(req CreateNetworkRequest, defaults map[string]string) (usernet.Network, error) {
	n := usernet.Network{ID: req.NetworkID}
	if err := checkID("network", n.ID); err != nil {
		return n, err
	}
	if err := networkOptions(&n, req.Options, defaults); err != nil {
		return n, err
	}
	ipv4, err := flag(req.Options, optEnableIPv4, true) // always on before 28.0
	if err != nil {
		return n, err
	}
	if !ipv4 {
		req.IPv4Data = nil
	}
	null := false
	for _, d := range slices.Concat(req.IPv4Data, req.IPv6Data) {
		s, err := subnetOf(d)
		if err != nil {
			return n, err
		}
		// The null IPAM driver answers with the pool of everything, to mean none.
		if s.Prefix.Bits() == 0 {
			null = true
			continue
		}
		n.Subnets = append(n.Subnets, s)
	}
	switch own := n.Options.Subnets; {
	case len(own) == 0:
	case len(n.Subnets) > 0 || !null:
		return n, invalid("option subnet: the engine chose %s; give docker network create --subnet, or --ipam-driver null", prefixes(n.Subnets))
	default:
		n.Subnets = slices.Clone(own)
	}
	return n, config.Network(n)
}

// networkOptions reads what GwAllocCheck and CreateNetwork both carry.
func networkOptions(n *usernet.Network, o Options, defaults map[string]string) (err error) {
	if n.Internal, err = flag(o, optInternal, false); err != nil {
		return err
	}
	if n.IPv6, err = flag(o, optEnableIPv6, false); err != nil {
		return err
	}
	raw, err := value[map[string]string](o, optGeneric)
	if err != nil {
		return err
	}
	n.Options, err = config.OptionsOver(defaults, raw)
	return err
}

func prefixes(subnets []usernet.Subnet) string {
	var s []string
	for _, sub := range subnets {
		s = append(s, sub.Prefix.String())
	}
	if s == nil {
		return "no subnet"
	}
	return strings.Join(s, ", ")
}

func subnetOf(d IPAMData) (usernet.Subnet, error) {
	p, err := netip.ParsePrefix(d.Pool)
	if err != nil {
		return usernet.Subnet{}, invalid("pool %.64q: want a subnet in CIDR notation", d.Pool)
	}
	s := usernet.Subnet{Prefix: p.Masked()}
	if s.Gateway, err = address("gateway", d.Gateway); err != nil {
		return s, err
	}
	for _, name := range slices.Sorted(maps.Keys(d.AuxAddresses)) {
		// Docker's bridge driver makes this one the containers' default gateway. Ours is the network's own address.
		if name == "DefaultGatewayIPv4" || name == "DefaultGatewayIPv6" {
			return s, invalid("auxiliary address %s: not supported, use --gateway", name)
		}
		a, err := address("auxiliary address "+name, d.AuxAddresses[name])
		if err != nil {
			return s, err
		}
		if a.IsValid() && s.Prefix.Contains(a) && !slices.Contains(s.Reserved, a) {
			s.Reserved = append(s.Reserved, a)
		}
	}
	return s, nil
}

// address reads an address in CIDR notation, or a bare one. It is zero for what Go writes for a nil *net.IPNet.
func address(what, s string) (netip.Addr, error) {
	if s == "" || s == "<nil>" {
		return netip.Addr{}, nil
	}
	bare, _, _ := strings.Cut(s, "/")
	a, err := netip.ParseAddr(bare)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, invalid("%s %.64q: want an address", what, s)
	}
	return a, nil
}

// endpointOf reads a request for an endpoint.
func endpointOf(req CreateEndpointRequest) (ep usernet.Endpoint, err error) {
	ep.ID, ep.NetworkID = req.EndpointID, req.NetworkID
	if err := checkIDs(ep.NetworkID, ep.ID); err != nil {
		return ep, err
	}
	var ifc EndpointInterface
	if req.Interface != nil {
		ifc = *req.Interface
	}
	if ep.Addr4, err = interfaceAddress(ifc.Address); err != nil || ep.Addr4.IsValid() && !ep.Addr4.Addr().Is4() {
		return ep, invalid("address %.64q: want an IPv4 address in CIDR notation", ifc.Address)
	}
	if ep.Addr6, err = interfaceAddress(ifc.AddressIPv6); err != nil || ep.Addr6.IsValid() && !ep.Addr6.Addr().Is6() {
		return ep, invalid("address %.64q: want an IPv6 address in CIDR notation", ifc.AddressIPv6)
	}
	if ifc.MacAddress != "" {
		if ep.MAC, err = net.ParseMAC(ifc.MacAddress); err != nil || !station(ep.MAC) {
			return ep, invalid("MAC address %.64q: want the six bytes of one station", ifc.MacAddress)
		}
	}
	if ep.IfName, err = value[string](req.Options, optIfName); err != nil {
		return ep, err
	}
	if ep.IfName != "" {
		if err := config.LinkName(ep.IfName); err != nil {
			return ep, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(req.Options)) {
		if strings.HasPrefix(name, "usernet.") {
			return ep, invalid("option %.64q: an endpoint has no such option", name)
		}
	}
	// The ports are published later, but bad ones are better refused before anything is set up.
	_, err = portsOf(req.Options)
	return ep, err
}

// station reports whether a link can have the address: an Ethernet address of no group and not all zero.
func station(mac net.HardwareAddr) bool {
	return len(mac) == 6 && mac[0]&1 == 0 && !slices.Equal(mac, make([]byte, 6))
}

func interfaceAddress(s string) (netip.Prefix, error) {
	if s == "" {
		return netip.Prefix{}, nil
	}
	p, err := netip.ParsePrefix(s)
	if err == nil && (p.Addr().IsUnspecified() || p.Addr().IsMulticast() || p.Addr().Is4In6()) {
		err = errors.New("not an interface's")
	}
	return p, err
}

var protos = map[uint8]usernet.Proto{6: usernet.TCP, 17: usernet.UDP, 132: usernet.SCTP}

// portsOf reads the published ports among the options of an endpoint.
func portsOf(o Options) ([]usernet.Port, error) {
	bindings, err := value[[]PortBinding](o, optPortMap)
	if err != nil {
		return nil, err
	}
	// Another network of the container is its IPv6 gateway and publishes there (28.0).
	ipv4Only, err := flag(o, optNo6To4, false)
	if err != nil {
		return nil, err
	}
	var ports []usernet.Port
	for _, b := range bindings {
		p, err := portOf(b)
		if err != nil {
			return nil, err
		}
		if ipv4Only && p.HostIP.Is6() {
			continue
		}
		p.IPv4Only = ipv4Only && !p.HostIP.IsValid()
		ports = append(ports, p)
	}
	return ports, nil
}

func portOf(b PortBinding) (usernet.Port, error) {
	p := usernet.Port{Proto: protos[b.Proto], HostPort: b.HostPort, ContainerPort: b.Port}
	if p.Proto == "" {
		return p, invalid("port %d: protocol number %d: want 6 (tcp), 17 (udp) or 132 (sctp)", b.Port, b.Proto)
	}
	if p.ContainerPort == 0 {
		return p, invalid("port %s: a container has no port 0", p)
	}
	if b.HostIP != "" {
		ip, err := config.HostIP(b.HostIP)
		if err != nil {
			return p, err
		}
		p.HostIP = ip
	}
	switch {
	case b.HostPortEnd == 0 || b.HostPortEnd == b.HostPort:
	case b.HostPortEnd < b.HostPort || b.HostPort == 0:
		return p, invalid("port %s: range %d-%d of the host", p, b.HostPort, b.HostPortEnd)
	default:
		p.HostPortEnd = b.HostPortEnd
	}
	return p, nil
}

// sandboxOf checks the path of a container's network namespace.
func sandboxOf(key string) error {
	if key != "" && (!filepath.IsAbs(key) || len(key) > 4096 || strings.ContainsRune(key, 0)) {
		return invalid("sandbox key %.64q: want an absolute path", key)
	}
	return nil
}
