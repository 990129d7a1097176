package firewall

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// The chains of ours.
const (
	isolate     = "USERNET-ISOLATE"
	forward     = "USERNET-FORWARD"
	input       = "USERNET-INPUT"
	dnat        = "USERNET-DNAT"
	postrouting = "USERNET-POSTROUTING"
)

// admitted is what may enter a network from elsewhere: answers, and what a DNAT rule (ours for a published port)
// sent there on purpose.
const admitted = "RELATED,ESTABLISHED,DNAT"

// table is our part of one table: the chains, and the hooks that lead to them.
type table struct {
	name   string
	chains []string
	hooks  []hook
}

// hook is a jump from a built-in chain to one of ours.
type hook struct {
	base, chain    string
	match4, match6 string

	// after is a rule that stays before the jump when it is the chain's first; "" means that none does.
	after string
	// harmless tells whether a rule may stand before the jump. Nil means that none may.
	harmless func(rule string) bool
}

// tables in the order in which they are changed: isolation before anything opens.
var tables = []table{
	{"mangle", []string{isolate}, []hook{{base: "FORWARD", chain: isolate}}},
	{"nat", []string{dnat, postrouting}, []hook{
		// A client with a link-local address cannot be forwarded; it gets the relay's listener.
		{base: "PREROUTING", chain: dnat,
			match4: "-m addrtype --dst-type LOCAL ",
			match6: "! -s fe80::/10 -m addrtype --dst-type LOCAL "},
		// Likewise what the host sends to its own loopback: its source address has no meaning on a bridge.
		{base: "OUTPUT", chain: dnat,
			match4: "! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL ",
			match6: "! -s fe80::/10 ! -d ::1/128 -m addrtype --dst-type LOCAL "},
		{base: "POSTROUTING", chain: postrouting},
	}},
	{"filter", []string{forward, input}, []hook{
		{base: "FORWARD", chain: forward, after: "-j DOCKER-USER", harmless: dockers},
		{base: "INPUT", chain: input, harmless: anything},
	}},
}

// anything may stand before ours in filter INPUT: we only accept, and what the administrator puts on top is meant.
func anything(string) bool { return true }

// dockers tells whether a rule may stand before ours in filter FORWARD. Docker keeps its own jumps on top, which
// decide about Docker's bridges only, except DOCKER-USER: what the administrator forbids there holds for our
// networks too. An ACCEPT takes nothing from us; what must not pass was dropped in mangle.
func dockers(rule string) bool {
	return strings.HasSuffix(rule, "-j ACCEPT") || strings.Contains(rule, "-j DOCKER")
}

func (h hook) jump(v6 bool) string {
	if v6 {
		return h.match6 + "-j " + h.chain
	}
	return h.match4 + "-j " + h.chain
}

// rules is what s needs in one address family. A rule is written as iptables -S prints it, without "-A CHAIN ", so
// that it can be compared with the kernel's; none depends on its place in the chain.
func rules(s State, v6 bool) ruleset {
	var r ruleset
	for _, n := range s.Networks {
		subnets := slices.DeleteFunc(slices.Clone(n.Subnets), func(p netip.Prefix) bool { return p.Addr().Is4() == v6 })
		if len(subnets) == 0 {
			continue
		}
		if r.chains == nil {
			r = newRuleset(v6)
		}
		for _, a := range n.Resolver {
			if a.Is6() == v6 {
				at := netip.PrefixFrom(a, a.BitLen())
				r.add(input, "-d %s -i %s -p udp -m udp --dport 53 -j ACCEPT", at, n.Bridge)
				r.add(input, "-d %s -i %s -p tcp -m tcp --dport 53 -j ACCEPT", at, n.Bridge)
			}
		}
		if n.Internal {
			r.add(isolate, "-i %s ! -o %[1]s -j DROP", n.Bridge)
			r.add(isolate, "! -i %s -o %[1]s -j DROP", n.Bridge)
			// Frames between two ports of the bridge come by here as well, under net.bridge.bridge-nf-call-iptables.
			r.add(forward, "-i %s -o %[1]s -j ACCEPT", n.Bridge)
			continue
		}
		r.add(isolate, "! -i %s -o %[1]s -m conntrack ! --ctstate %s -j DROP", n.Bridge, admitted)
		for _, other := range s.Foreign {
			if plain(other) && !s.owns(other) {
				r.add(isolate, "-i %s -o %s -m conntrack ! --ctstate %s -j DROP", n.Bridge, other, admitted)
			}
		}
		r.add(forward, "-i %s -j ACCEPT", n.Bridge)
		r.add(forward, "-o %s -j ACCEPT", n.Bridge)
		for _, subnet := range subnets {
			r.translateSource(n, subnet)
		}
		for _, rule := range n.forwardRules(v6) {
			r.add(dnat, "%s", rule)
		}
	}
	if len(r.chains[input]) == 0 { // most hosts do without
		delete(r.chains, input)
		delete(r.places, "filter INPUT")
	}
	return r
}

func (r ruleset) translateSource(n Network, subnet netip.Prefix) {
	if n.Masquerade {
		target, source := "MASQUERADE", n.Source4
		if subnet.Addr().Is6() {
			source = n.Source6
		}
		if source.IsValid() {
			target = "SNAT --to-source " + source.String()
		}
		r.add(postrouting, "-s %s ! -o %s -j %s", subnet.Masked(), n.Bridge, target)
	}
}

func (s State) owns(bridge string) bool {
	return slices.ContainsFunc(s.Networks, func(n Network) bool { return n.Bridge == bridge })
}

func (r ruleset) add(chain, format string, args ...any) {
	rule := fmt.Sprintf(format, args...)
	if !slices.Contains(r.chains[chain], rule) {
		r.chains[chain] = append(r.chains[chain], rule)
	}
}
