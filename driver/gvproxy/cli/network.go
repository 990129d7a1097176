package cli

import (
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/usernet/usernet/driver/gvproxy"
)

// The MTUs that IPv4 knows (RFC 791: 68) and that DHCP can name (RFC 2132).
const (
	minMTU = 68
	maxMTU = 65535
)

// maxBits is the prefix length of the smallest subnet: a gateway, a VM and the host in it.
const maxBits = 29

func (s *stack) check() (n Network, err error) {
	n = Network{MTU: s.MTU, Capture: s.CaptureFile, Search: s.Search}
	if n.MTU == 0 {
		n.MTU = defaultMTU
	}
	if n.MTU < minMTU || n.MTU > maxMTU {
		return n, invalid("mtu %d: want %d to %d", n.MTU, minMTU, maxMTU)
	}
	if err := s.addresses(&n); err != nil {
		return n, err
	}
	if n.GatewayMAC, err = mac(or(s.GatewayMAC, gatewayMAC)); err != nil {
		return n, fmt.Errorf("gatewayMacAddress: %w", err)
	}
	if err := s.aliases(&n); err != nil {
		return n, err
	}
	if err := s.machines(&n); err != nil {
		return n, err
	}
	if s.DNS != nil { // The API shows the difference.
		n.Zones = make([]gvproxy.Zone, 0, len(s.DNS))
	}
	for _, z := range s.DNS {
		zone, err := z.check()
		if err != nil {
			return n, fmt.Errorf("dns zone %.64q: %w", z.Name, err)
		}
		n.Zones = append(n.Zones, zone)
	}
	for _, local := range slices.Sorted(maps.Keys(s.Forwards)) {
		proto, at := gvproxy.TCP, local
		if rest, ok := strings.CutPrefix(local, "udp:"); ok {
			proto, at = gvproxy.UDP, rest
		}
		f, err := gvproxy.ParseForward(proto, at, s.Forwards[local])
		if err != nil {
			return n, invalid("forward %.64q to %.64q: %w", local, s.Forwards[local], err)
		}
		n.Forwards = append(n.Forwards, f)
	}
	return n, nil
}

func or(text, otherwise string) string {
	if text == "" {
		return otherwise
	}
	return text
}

// addresses sets the subnet and who is who in it.
func (s *stack) addresses(n *Network) error {
	prefix, err := netip.ParsePrefix(or(s.Subnet, defaultSubnet))
	if err != nil || !prefix.Addr().Is4() {
		return invalid("subnet %.64q: want an IPv4 one, as %s", s.Subnet, defaultSubnet)
	}
	if prefix.Bits() > maxBits {
		return invalid("subnet %s: want /%d or larger", prefix, maxBits)
	}
	n.Subnet = prefix.Masked()
	first, last := n.Subnet.Addr().Next(), lastAddr(n.Subnet).Prev()
	for _, a := range []struct {
		name, text string
		otherwise  netip.Addr
		to         *netip.Addr
	}{
		{"gatewayIP", s.GatewayIP, first, &n.Gateway},
		{"deviceIP", s.DeviceIP, first.Next(), &n.Device},
		{"hostIP", s.HostIP, last, &n.Host},
	} {
		if *a.to = a.otherwise; a.text != "" {
			if *a.to, err = address(a.text); err != nil {
				return fmt.Errorf("%s: %w", a.name, err)
			}
		}
		if !n.Subnet.Contains(*a.to) || a.to.Less(first) || last.Less(*a.to) {
			return invalid("%s %s: want an address of %s, %s to %s", a.name, a.to, n.Subnet, first, last)
		}
	}
	if n.Gateway == n.Device || n.Gateway == n.Host || n.Device == n.Host {
		return invalid("gatewayIP %s, deviceIP %s and hostIP %s: want three addresses", n.Gateway, n.Device, n.Host)
	}
	return nil
}

// lastAddr is the broadcast address of an IPv4 prefix.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}

// aliases sets the addresses that stand for the gateway or for others.
func (s *stack) aliases(n *Network) error {
	n.NAT = make(map[netip.Addr]netip.Addr)
	for from, to := range s.NAT {
		a, err := address(from)
		if err != nil {
			return fmt.Errorf("nat: %w", err)
		}
		if n.NAT[a], err = address(to); err != nil {
			return fmt.Errorf("nat of %s: %w", a, err)
		}
	}
	if len(s.NAT) == 0 {
		n.NAT[n.Host] = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	for _, text := range s.VirtualIPs {
		a, err := address(text)
		if err != nil {
			return fmt.Errorf("gatewayVirtualIPs: %w", err)
		}
		n.VirtualIPs = append(n.VirtualIPs, a)
	}
	if len(s.VirtualIPs) == 0 {
		n.VirtualIPs = []netip.Addr{n.Host}
	}
	return nil
}

// machines sets what is fixed for VMs that are known beforehand.
func (s *stack) machines(n *Network) error {
	n.Leases = make(map[netip.Addr]gvproxy.MAC)
	for text, hw := range s.Leases {
		a, err := address(text)
		if err != nil {
			return fmt.Errorf("dhcpStaticLeases: %w", err)
		}
		if n.Leases[a], err = mac(hw); err != nil {
			return fmt.Errorf("dhcpStaticLeases of %s: %w", a, err)
		}
	}
	n.VPNKitMACs = make(map[string]gvproxy.MAC)
	for uuid, hw := range s.VPNKitMACs {
		m, err := mac(hw)
		if err != nil {
			return fmt.Errorf("vpnKitUUIDMacAddresses of %.64q: %w", uuid, err)
		}
		n.VPNKitMACs[strings.ToLower(uuid)] = m
	}
	return nil
}

func (z zone) check() (gvproxy.Zone, error) {
	checked := gvproxy.Zone{Name: z.Name}
	var err error
	if z.DefaultIP != "" {
		if checked.Default, err = address(z.DefaultIP); err != nil {
			return checked, fmt.Errorf("defaultIP: %w", err)
		}
	}
	if z.Records != nil { // The API shows the difference.
		checked.Records = make([]gvproxy.Record, 0, len(z.Records))
	}
	for _, r := range z.Records {
		record := gvproxy.Record{Name: r.Name}
		if r.IP != "" {
			if record.Addr, err = address(r.IP); err != nil {
				return checked, fmt.Errorf("record %.64q: %w", r.Name, err)
			}
		}
		if r.Regexp != nil {
			if record.Pattern, err = regexp.Compile(*r.Regexp); err != nil {
				return checked, invalid("record: %w", err)
			}
		}
		checked.Records = append(checked.Records, record)
	}
	return checked, nil
}

// doubts are about settings that gvproxy takes and that lead nowhere.
func (s *stack) doubts(n Network) []string {
	var doubts []string
	for _, a := range slices.SortedFunc(maps.Keys(n.Leases), netip.Addr.Compare) {
		if !n.Subnet.Contains(a) {
			doubts = append(doubts, fmt.Sprintf("dhcpStaticLeases: %s is not in %s", a, n.Subnet))
		}
	}
	for _, f := range n.Forwards {
		if !n.Subnet.Contains(f.Target.Addr()) && f.Target.Addr().Is4() {
			doubts = append(doubts, fmt.Sprintf("forwards: %s is not in %s", f.Target.Addr(), n.Subnet))
		}
	}
	return doubts
}
