package cni

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
	"net/netip"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/driver"
	"github.com/usernet/usernet/driver/control"
)

// networkID is made from the network's name: that is all by which CNI knows a network.
func networkID(name string) string { return hash("cni/" + name) }

// endpointID is made from what CNI knows an attachment by. Names of links are made from its beginning.
func endpointID(network, containerID, ifName string) string {
	return hash(strings.Join([]string{"cni", network, containerID, ifName}, "/"))
}

func hash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}

// request is what a configuration asks of the daemon, but for what an IPAM plugin decides.
func request(w wire, a *skel.CmdArgs) (control.AttachRequest, error) {
	req := control.AttachRequest{
		Prepare:   true,
		ID:        endpointID(w.Name, a.ContainerID, a.IfName),
		Interface: a.IfName,
		NoDefault: w.IsDefaultGateway != nil && !*w.IsDefaultGateway,
	}
	env, err := environmentOf(a.Args)
	if err != nil {
		return req, err
	}
	if req.Network, err = network(w); err != nil {
		return req, err
	}
	req.Container, err = container(w, a.ContainerID, env)
	if err != nil {
		return req, err
	}
	req.MAC = cmp.Or(w.Runtime.MAC, w.Args.CNI.MAC, string(env.MAC))
	if w.ipam() == "" {
		if req.Addresses, err = addresses(w, env); err != nil {
			return req, err
		}
	}
	if req.Ports, err = ports(w.Runtime.PortMappings); err != nil {
		return req, err
	}
	if req.Limits, err = limits(w.Runtime.Bandwidth); err != nil {
		return req, err
	}
	if req.Names = w.wantsNames(); req.Names && w.DNS.Domain != "" {
		req.Domains = []string{w.DNS.Domain}
	}
	return req, nil
}

func environmentOf(args string) (environment, error) {
	var env environment
	if err := types.LoadArgs(args, &env); err != nil {
		return env, failed(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: %v", err)
	}
	return env, nil
}

// network is the network that a configuration describes.
func network(w wire) (control.NetworkSpec, error) {
	spec := control.NetworkSpec{ID: networkID(w.Name), Name: w.Name, Internal: w.Internal}
	options := maps.Clone(w.Options)
	if options == nil {
		options = map[string]string{}
	}
	set := func(name, value string) error {
		if other, given := options[name]; given && other != value {
			return invalid("%s is given twice, as %.64q and as %.64q", name, value, other)
		}
		options[name] = value
		return nil
	}
	for _, o := range []struct {
		name, value string
		given       bool
	}{
		{"mode", w.Mode, w.Mode != ""},
		{"mtu", strconv.Itoa(w.MTU), w.MTU != 0},
		{"bridge", w.Bridge, w.Bridge != ""},
		{"icc", "false", w.PortIsolation},
		{"masquerade", "false", w.IPMasq != nil && !*w.IPMasq},
	} {
		if !o.given {
			continue
		}
		if err := set(o.name, o.value); err != nil {
			return spec, err
		}
	}
	if _, err := config.Options(options); err != nil {
		return spec, err
	}
	spec.Options = options
	if w.ipam() != "" {
		return spec, nil
	}
	var err error
	spec.Subnets, err = subnets(w)
	return spec, err
}

// subnets are those that addresses are chosen from when no IPAM plugin does that. None: one is chosen as well.
func subnets(w wire) ([]control.Subnet, error) {
	ranges := w.Subnets
	if w.Subnet != "" {
		ranges = append([]addressRange{{Subnet: w.Subnet, Gateway: w.Gateway}}, ranges...)
	} else if w.Gateway != "" {
		return nil, invalid("gateway %.64q: it needs a subnet", w.Gateway)
	}
	if len(w.Runtime.IPRanges) > 0 {
		ranges = nil
		for _, set := range w.Runtime.IPRanges {
			ranges = append(ranges, set...)
		}
	}
	var list []control.Subnet
	for _, r := range ranges {
		s, err := r.value()
		if err != nil {
			return nil, err
		}
		list = append(list, s)
	}
	return list, nil
}

// value is the subnet of a range. Where no gateway is given, it is the first address.
func (r addressRange) value() (control.Subnet, error) {
	p, err := netip.ParsePrefix(r.Subnet)
	if err != nil || p.Addr().Is4In6() {
		return control.Subnet{}, invalid("subnet %.64q: want one such as 10.1.0.0/24", r.Subnet)
	}
	s := control.Subnet{Subnet: p.Masked(), Gateway: p.Masked().Addr().Next()}
	for _, a := range []struct {
		text string
		to   *netip.Addr
	}{{r.Gateway, &s.Gateway}, {r.Start, &s.First}, {r.End, &s.Last}} {
		if a.text == "" {
			continue
		}
		if *a.to, err = netip.ParseAddr(a.text); err != nil {
			return control.Subnet{}, invalid("subnet %s: %.64q is no address", p, a.text)
		}
	}
	return s, nil
}

// container is what is known of a container's names. Kubernetes tells those of its pods, and so does Podman.
func container(w wire, id string, env environment) (driver.Container, error) {
	c := driver.Container{ID: id, Name: string(env.K8S_POD_NAME)}
	aliases, err := w.Runtime.aliases(w.Name)
	if err != nil {
		return c, err
	}
	c.Aliases = aliases
	if ns := string(env.K8S_POD_NAMESPACE); c.Name != "" && ns != "" && ns != c.Name {
		c.Aliases = append(c.Aliases, c.Name+"."+ns)
	}
	return c, nil
}

// aliases are the container's further names on a network. Podman sends those of all networks.
func (r runtimeConfig) aliases(network string) ([]string, error) {
	if len(r.Aliases) == 0 {
		return nil, nil
	}
	var list []string
	if json.Unmarshal(r.Aliases, &list) == nil {
		return list, nil
	}
	var of map[string][]string
	if err := json.Unmarshal(r.Aliases, &of); err != nil {
		return nil, failed(types.ErrDecodingFailure, "aliases %.64s: want a list of names", r.Aliases)
	}
	return of[network], nil
}

// addresses are those that are asked for; none: they are chosen.
func addresses(w wire, env environment) ([]netip.Addr, error) {
	texts := w.Runtime.IPs
	if len(texts) == 0 {
		texts = w.Args.CNI.IPs
	}
	if len(texts) == 0 && env.IP != "" {
		texts = strings.Split(string(env.IP), ",")
	}
	var list []netip.Addr
	for _, text := range texts {
		plain, _, _ := strings.Cut(strings.TrimSpace(text), "/") // the mask is the subnet's
		a, err := netip.ParseAddr(plain)
		if err != nil {
			return nil, invalid("address %.64q: want one such as 10.1.0.5", text)
		}
		list = append(list, a.Unmap())
	}
	return list, nil
}

// ports are the port mappings but for those without a host port, which Kubernetes means not to be published.
func ports(mappings []portMapping) ([]control.Port, error) {
	var list []control.Port
	for _, m := range mappings {
		if m.HostPort == 0 {
			continue
		}
		if m.HostPort < 0 || m.HostPort > 65535 || m.ContainerPort < 1 || m.ContainerPort > 65535 {
			return nil, invalid("port mapping of %d to %d: want numbers from 1 to 65535", m.HostPort, m.ContainerPort)
		}
		p := control.Port{Proto: usernet.Proto(strings.ToLower(m.Protocol)), HostPort: uint16(m.HostPort), ContainerPort: uint16(m.ContainerPort)}
		switch p.Proto {
		case "":
			p.Proto = usernet.TCP
		case usernet.TCP, usernet.UDP, usernet.SCTP:
		default:
			return nil, invalid("port mapping of %d: protocol %.64q: want tcp, udp or sctp", m.HostPort, m.Protocol)
		}
		if m.HostIP != "" {
			ip, err := config.HostIP(m.HostIP)
			if err != nil {
				return nil, err
			}
			p.HostIP = ip
		}
		list = append(list, p)
	}
	return list, nil
}

// limits are what a bandwidth asks for. CNI means by ingress what the container receives.
func limits(b bandwidth) (driver.Limits, error) {
	l := driver.Limits{In: driver.Rate{Bits: b.IngressRate, Burst: b.IngressBurst}, Out: driver.Rate{Bits: b.EgressRate, Burst: b.EgressBurst}}
	for _, r := range []driver.Rate{l.In, l.Out} {
		if r.Bits == 0 && r.Burst != 0 {
			return l, invalid("bandwidth: a burst of %d bits without a rate", r.Burst)
		}
	}
	return l, nil
}

// wantsNames tells whether containers are to ask our resolver. Where servers are given they ask those.
func (w wire) wantsNames() bool {
	return (w.Names == nil || *w.Names) && len(w.DNS.Nameservers) == 0 && len(w.Runtime.DNS.Servers) == 0
}
