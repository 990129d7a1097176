package firewall

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/usernet/usernet"
)

func (f Forward) valid() bool {
	target := f.Target.Addr()
	return (f.Proto == usernet.TCP || f.Proto == usernet.UDP || f.Proto == usernet.SCTP) && f.HostPort != 0 &&
		f.Target.Port() != 0 && target.IsValid() && target == target.Unmap().WithZone("")
}

// forwardRules are the DNAT rules of the network's forwards whose target is of the family, a range of ports that keep
// their numbers being one rule. They pass over what comes from the network's own bridge: a container that calls a port
// of its own network by the host's address gets the relay, as localhost does. Translated, it would have to be
// masqueraded too, and sent back through the port it came from where net.bridge.bridge-nf-call-iptables is on.
//
// A shifted range (the host's 8000-8009 to the container's 80-89) is one rule per port: iptables could
// write it as IP:80-89/8000, but the kernel then takes the next port of the range when a connection would clash with
// another one of the client's, and the client talks to the wrong service.
func (n Network) forwardRules(v6 bool) []string {
	fs := slices.Clone(n.Forwards)
	fs = slices.DeleteFunc(fs, func(f Forward) bool { return f.Target.Addr().Is4() == v6 || !f.translated() })
	slices.SortFunc(fs, func(a, b Forward) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), a.HostIP.Compare(b.HostIP), cmp.Compare(a.HostPort, b.HostPort),
			a.Target.Compare(b.Target))
	})
	var out []string
	for len(fs) > 0 {
		k := 1
		for k < len(fs) && fs[k].continues(fs[k-1]) {
			k++
		}
		out = append(out, n.rangeRule(fs[0], fs[k-1]))
		fs = fs[k:]
	}
	return out
}

// translated tells whether the kernel forwards f. The relay does what it cannot: from loopback, from an IPv6 link-local
// address, whose clients cannot be routed, and from an address of the other family.
func (f Forward) translated() bool {
	ip := f.HostIP
	return !ip.IsValid() || ip.Is4() == f.Target.Addr().Is4() && !ip.IsLoopback() && !(ip.Is6() && ip.IsLinkLocalUnicast())
}

// continues tells whether f is the next port of a range that ends with prev and keeps its numbers.
func (f Forward) continues(prev Forward) bool {
	next := prev
	next.HostPort++
	next.Target = netip.AddrPortFrom(prev.Target.Addr(), next.HostPort)
	return prev.HostPort == prev.Target.Port() && next.HostPort != 0 && f == next
}

func (n Network) rangeRule(first, last Forward) string {
	var dst string
	if first.HostIP.IsValid() && !first.HostIP.IsUnspecified() {
		dst = fmt.Sprintf("-d %s ", netip.PrefixFrom(first.HostIP, first.HostIP.BitLen()))
	}
	ports, to := fmt.Sprint(first.HostPort), first.Target.String()
	if last != first {
		ports, to = fmt.Sprintf("%d:%d", first.HostPort, last.HostPort), first.Target.Addr().String()
	}
	return fmt.Sprintf("%s! -i %s -p %s -m %[3]s --dport %s -j DNAT --to-destination %s", dst, n.Bridge, first.Proto, ports, to)
}
