package config

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/usernet/usernet"
)

// maxSubnets bounds the work that one request can ask for.
const maxSubnets = 64

func setSubnets(o *usernet.Options, value string) error {
	if strings.Count(value, ",") >= maxSubnets {
		return fmt.Errorf("want at most %d subnets", maxSubnets)
	}
	for _, field := range strings.Split(value, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(field))
		if err != nil {
			return fmt.Errorf("want subnets such as 10.1.0.0/24, separated by commas")
		}
		if p != p.Masked() {
			return fmt.Errorf("%s has bits behind its mask, did you mean %s?", p, p.Masked())
		}
		if err := usable(p); err != nil {
			return err
		}
		for _, s := range o.Subnets {
			if s.Prefix.Overlaps(p) {
				return fmt.Errorf("%s and %s overlap", s.Prefix, p)
			}
		}
		o.Subnets = append(o.Subnets, usernet.Subnet{Prefix: p})
	}
	return nil
}

func setGateways(o *usernet.Options, value string) error {
	for _, field := range strings.Split(value, ",") {
		a, err := netip.ParseAddr(strings.TrimSpace(field))
		if err != nil {
			return fmt.Errorf("want IP addresses, separated by commas")
		}
		i := slices.IndexFunc(o.Subnets, func(s usernet.Subnet) bool { return s.Prefix.Contains(a) })
		switch {
		case i < 0:
			return fmt.Errorf("%s is in none of the subnets that option subnet gives", a)
		case o.Subnets[i].Gateway.IsValid():
			return fmt.Errorf("%s has two gateways", o.Subnets[i].Prefix)
		}
		o.Subnets[i].Gateway = a
		if err := gateway(o.Subnets[i]); err != nil {
			return err
		}
	}
	return nil
}

func defaultGateways(subnets []usernet.Subnet) {
	for i, s := range subnets {
		if !s.Gateway.IsValid() {
			subnets[i].Gateway = s.Prefix.Addr().Next()
		}
	}
}

// Network checks what the fields of a network say together.
func Network(n usernet.Network) error {
	if mtu := n.Options.MTU; mtu != 0 && (mtu < minMTU || mtu > maxMTU) {
		return invalid("MTU %d: want %d to %d bytes", mtu, minMTU, maxMTU)
	}
	if n.IPv6 && n.MTU() < minMTU6 {
		return invalid("MTU %d: IPv6 needs %d bytes (RFC 8200)", n.MTU(), minMTU6)
	}
	if n.Options.Mode == usernet.Usermode && n.MTU() < minMTU6 {
		return invalid("MTU %d: networks of mode usermode need %d bytes", n.MTU(), minMTU6) // of gVisor's IPv6, used or not
	}
	if len(n.Subnets) > maxSubnets {
		return invalid("network: %d subnets, want at most %d", len(n.Subnets), maxSubnets)
	}
	for i, s := range n.Subnets {
		if err := subnet(s); err != nil {
			return invalid("subnet %s: %w", s.Prefix, err)
		}
		if s.Prefix.Addr().Is6() && !n.IPv6 {
			return invalid("subnet %s: IPv6 is not enabled on the network", s.Prefix)
		}
		for _, other := range n.Subnets[:i] {
			if other.Prefix.Overlaps(s.Prefix) {
				return invalid("subnet %s: it overlaps %s", s.Prefix, other.Prefix)
			}
		}
	}
	return nil
}

func subnet(s usernet.Subnet) error {
	switch {
	case !s.Prefix.IsValid():
		return fmt.Errorf("it is empty")
	case s.Prefix != s.Prefix.Masked():
		return fmt.Errorf("it has bits behind its mask")
	}
	if err := usable(s.Prefix); err != nil {
		return err
	}
	for _, a := range s.Reserved {
		if !s.Prefix.Contains(a) {
			return fmt.Errorf("reserved address %s is outside", a)
		}
	}
	for _, a := range []netip.Addr{s.First, s.Last} {
		if a.IsValid() && !s.Prefix.Contains(a) {
			return fmt.Errorf("address %s of its range is outside", a)
		}
	}
	if s.First.IsValid() && s.Last.IsValid() && s.Last.Less(s.First) {
		return fmt.Errorf("its range ends at %s, before %s", s.Last, s.First)
	}
	if s.Gateway.IsValid() {
		return gateway(s)
	}
	return nil
}

// usable says why p cannot be the subnet of a network.
func usable(p netip.Prefix) error {
	a := p.Addr()
	switch {
	case a.Is4In6():
		return fmt.Errorf("%s is IPv4 written as IPv6", p)
	case p.Bits() == 0:
		return fmt.Errorf("%s is the whole internet", p)
	case p.Bits() == a.BitLen():
		return fmt.Errorf("%s has room for the gateway alone", p)
	case a.IsLoopback(), a.IsMulticast():
		return fmt.Errorf("%s is loopback or multicast", p)
	}
	return nil
}

// gateway checks the gateway of s. The first address of an IPv4 subnet is the network's and the last one is broadcast,
// except in a /31 (RFC 3021).
func gateway(s usernet.Subnet) error {
	a := s.Gateway
	if !s.Prefix.Contains(a) || a.Zone() != "" {
		return fmt.Errorf("gateway %s is outside %s", a, s.Prefix)
	}
	if a.Is4() && s.Prefix.Bits() < 31 && (a == s.Prefix.Addr() || !s.Prefix.Contains(a.Next())) {
		return fmt.Errorf("gateway %s is the network or the broadcast address of %s", a, s.Prefix)
	}
	if slices.Contains(s.Reserved, a) {
		return fmt.Errorf("gateway %s is reserved", a)
	}
	return nil
}
