package netavark

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"go.podman.io/common/libnetwork/types"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/driver"
	"github.com/usernet/usernet/driver/control"
)

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w "+format, append([]any{usernet.ErrInvalid}, args...)...)
}

// labelPrefix makes a label an option: Podman's Docker-compatible API drops options.
const labelPrefix = "usernet."

// The options that mean something to this door alone. They are those of netavark's bridge driver.
const (
	optMetric    = "metric"           // of the containers' default routes
	optNoDefault = "no_default_route" // containers get none
	optIsolate   = "isolate"          // usernet's networks always are
)

var ourOptions = []string{optMetric, optNoDefault, optIsolate}

// defaultMetric is what netavark's bridge driver gives the routes of --route.
const defaultMetric = 100

// searchDomain is the domain that Podman's own resolver, aardvark-dns, has the names in.
const searchDomain = "dns.podman"

// routing is what our options say.
type routing struct {
	metric    int // 0: not given
	noDefault bool
}

// networkSpec reads a network.
func networkSpec(n network) (control.NetworkSpec, routing, error) {
	spec := control.NetworkSpec{ID: n.ID, Name: n.Name, Internal: n.Internal, IPv6: n.IPv6Enabled}
	if err := unsupported(n); err != nil {
		return spec, routing{}, err
	}
	for _, s := range n.Subnets {
		sub := control.Subnet{Subnet: prefix(s.Subnet), Gateway: addr(s.Gateway)}
		if !sub.Subnet.IsValid() {
			return spec, routing{}, invalid("subnet %s: want one in CIDR notation", s.Subnet.String())
		}
		spec.Subnets = append(spec.Subnets, sub)
	}
	options, err := mergeLabels(n.Options, n.Labels)
	if err != nil {
		return spec, routing{}, err
	}
	r, err := takeRouting(options)
	spec.Options = options
	return spec, r, err
}

// unsupported refuses what would silently not be obeyed.
func unsupported(n network) error {
	switch ipam := n.IPAMOptions["driver"]; ipam {
	case "", types.HostLocalIPAMDriver, types.NoneIPAMDriver:
	default:
		return invalid("IPAM driver %.64q: want %s or %s", ipam, types.HostLocalIPAMDriver, types.NoneIPAMDriver)
	}
	if n.NetworkInterface != "" {
		if name, given := n.Options["bridge"]; !given || name != n.NetworkInterface {
			return invalid("interface name %.64q: to name the bridge of a network of mode bridge, use the option bridge", n.NetworkInterface)
		}
	}
	return nil
}

// mergeLabels returns a copy of options with those that came as labels.
func mergeLabels(options, labels map[string]string) (map[string]string, error) {
	merged := maps.Clone(options)
	if merged == nil {
		merged = map[string]string{}
	}
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		name, ours := strings.CutPrefix(key, labelPrefix)
		if !ours {
			continue
		}
		if other, given := merged[name]; given && other != labels[key] {
			return nil, invalid("option %.64s=%.64s and label %.64s=%.64s", name, other, key, labels[key])
		}
		merged[name] = labels[key]
	}
	return merged, nil
}

// takeRouting takes our own options out of options.
func takeRouting(options map[string]string) (routing, error) {
	var r routing
	if v, given := options[optMetric]; given {
		n, err := strconv.ParseUint(v, 10, 31)
		if err != nil || n == 0 {
			return r, invalid("option %s=%.64s: want a number above 0", optMetric, v)
		}
		r.metric = int(n)
	}
	if v, given := options[optNoDefault]; given {
		b, err := strconv.ParseBool(v)
		if err != nil {
			return r, invalid("option %s=%.64s: want true or false", optNoDefault, v)
		}
		r.noDefault = b
	}
	if v, given := options[optIsolate]; given && v != "true" && v != "strict" {
		return r, invalid("option %s=%.64s: usernet's networks are always isolated from each other", optIsolate, v)
	}
	for _, name := range ourOptions {
		delete(options, name)
	}
	return r, nil
}

// endpointID is made from the container and the interface: Podman has no such thing. Names of links are made from its
// beginning, which has to differ between the interfaces of one container.
func endpointID(ex exec) string {
	sum := sha256.Sum256([]byte(ex.ContainerID + "/" + ex.NetworkOptions.InterfaceName))
	return hex.EncodeToString(sum[:])
}

// attachRequest reads the input of setup.
func attachRequest(ex exec) (control.AttachRequest, error) {
	req := control.AttachRequest{
		ID:        endpointID(ex),
		Container: driver.Container{ID: ex.ContainerID, Name: ex.ContainerName, Aliases: ex.NetworkOptions.Aliases},
		Interface: ex.NetworkOptions.InterfaceName,
		Names:     ex.Network.DNSEnabled,
	}
	if ex.ContainerID == "" {
		return req, invalid("container without an ID")
	}
	spec, r, err := networkSpec(ex.Network)
	if err != nil {
		return req, err
	}
	req.Network, req.Metric, req.NoDefault = spec, r.metric, r.noDefault
	if req.Names {
		req.Domains = []string{searchDomain}
	}
	if mac := ex.NetworkOptions.StaticMAC; len(mac) > 0 {
		req.MAC = net.HardwareAddr(mac).String()
	}
	for _, ip := range ex.NetworkOptions.StaticIPs {
		a := addr(ip)
		if !a.IsValid() {
			return req, invalid("address %s", ip)
		}
		req.Addresses = append(req.Addresses, a)
	}
	for _, route := range ex.Network.Routes {
		req.Routes = append(req.Routes, routeOf(route))
	}
	for _, s := range ex.Network.NetworkDNSServers {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return req, invalid("DNS server %.64q: want an address", s)
		}
		req.Upstream = append(req.Upstream, a)
	}
	options, err := config.Options(spec.Options)
	if err != nil {
		return req, err
	}
	if req.Ports, err = portsOf(ex.PortMappings); err != nil {
		return req, err
	}
	more, err := publishedPorts(ex.NetworkOptions.Options)
	if err != nil {
		return req, err
	}
	req.Ports = append(req.Ports, more...)
	for i := range req.Ports {
		if !req.Ports[i].HostIP.IsValid() {
			req.Ports[i].HostIP = options.HostBinding
		}
	}
	return req, nil
}

// optPublish is the one option that a container has on a network: ports as those of -p, joined by +, that we are to publish
// and Podman does not know of.
const optPublish = "publish"

func publishedPorts(options map[string]string) ([]control.Port, error) {
	var ports []control.Port
	for _, name := range slices.Sorted(maps.Keys(options)) {
		if name != optPublish {
			return nil, invalid("option %.64q: the only one that a container has on a network is %s", name, optPublish)
		}
		for spec := range strings.SplitSeq(options[name], "+") {
			some, err := config.Ports(spec)
			if err != nil {
				return nil, fmt.Errorf("option %s: %w", name, err)
			}
			for _, p := range some {
				ports = append(ports, control.PortOf(p))
			}
		}
	}
	return ports, nil
}

func routeOf(r types.Route) control.Route {
	w := control.Route{Destination: prefix(r.Destination), NextHop: addr(r.Gateway), Metric: defaultMetric, Type: string(r.RouteType)}
	if r.Metric != nil {
		w.Metric = int(*r.Metric)
	}
	return w
}

// portsOf writes out the ranges and protocols of port mappings. The same port may be mapped twice.
func portsOf(mappings []types.PortMapping) ([]control.Port, error) {
	var ports []control.Port
	seen := map[control.Port]bool{}
	for _, m := range mappings {
		p := control.Port{}
		if m.HostIP != "" {
			ip, err := config.HostIP(m.HostIP)
			if err != nil {
				return nil, err
			}
			p.HostIP = ip
		}
		count := max(1, int(m.Range))
		if m.ContainerPort == 0 || int(m.ContainerPort)+count > 1<<16 || int(m.HostPort)+count > 1<<16 {
			return nil, invalid("ports %d-%d to %d-%d", m.HostPort, int(m.HostPort)+count-1, m.ContainerPort, int(m.ContainerPort)+count-1)
		}
		for proto := range strings.SplitSeq(m.Protocol, ",") {
			if p.Proto = usernet.Proto(strings.ToLower(proto)); p.Proto == "" {
				p.Proto = usernet.TCP
			}
			if p.Proto != usernet.TCP && p.Proto != usernet.UDP && p.Proto != usernet.SCTP {
				return nil, invalid("port %d: protocol %.64q: want tcp, udp or sctp", m.ContainerPort, proto)
			}
			for i := range uint16(count) {
				p.ContainerPort, p.HostPort = m.ContainerPort+i, m.HostPort
				if m.HostPort != 0 {
					p.HostPort += i
				}
				if !seen[p] {
					seen[p] = true
					ports = append(ports, p)
				}
			}
		}
	}
	return ports, nil
}
