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

// forwardRules are the DNAT rules of forwards whose target is of the family, a range of ports that keep their numbers
// being one rule. A shifted range (the host's 8000-8009 to the container's 80-89) is one rule per port: iptables could
// write it as IP:80-89/8000, but the kernel then takes the next port of the range when a connection would clash with
// another one of the client's, and the client talks to the wrong service.
func forwardRules(forwards []Forward, v6 bool) []string {
	fs := slices.Clone(forwards)
	fs = slices.DeleteFunc(fs, func(f Forward) bool { return f.Target.Addr().Is4() == v6 || !f.translated() })
	slices.SortFunc(fs, func(a, b Forward) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), a.HostIP.Compare(b.HostIP), cmp.Compare(a.HostPort, b.HostPort),
			a.Target.Compare(b.Target))
	})
	var out []string
	for len(fs) > 0 {
		n := 1
		for n < len(fs) && fs[n].continues(fs[n-1]) {
			n++
		}
		out = append(out, rangeRule(fs[0], fs[n-1]))
		fs = fs[n:]
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

func rangeRule(first, last Forward) string {
	var dst string
	if first.HostIP.IsValid() && !first.HostIP.IsUnspecified() {
		dst = fmt.Sprintf("-d %s ", netip.PrefixFrom(first.HostIP, first.HostIP.BitLen()))
	}
	ports, to := fmt.Sprint(first.HostPort), first.Target.String()
	if last != first {
		ports, to = fmt.Sprintf("%d:%d", first.HostPort, last.HostPort), first.Target.Addr().String()
	}
	return fmt.Sprintf("%s-p %s -m %[2]s --dport %s -j DNAT --to-destination %s", dst, first.Proto, ports, to)
}
