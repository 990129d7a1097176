package firewall

import (
	"fmt"
	"slices"
	"strings"
)

// ruleset is our part of one address family's rules. The zero value is nothing at all.
type ruleset struct {
	chains map[string][]string // our chains that exist, and their rules
	places map[string]place    // by "TABLE BASE": where our jumps are
}

// place says how our chain is reached from one built-in chain.
type place struct {
	jumps []string // the jumps to our chain, as iptables -S prints them
	late  bool     // rules before the jump may decide about our packets
	at    int      // the position, from 1, that a new jump takes once those of jumps are gone
}

// newRuleset has all chains, empty, and all jumps in their place.
func newRuleset(v6 bool) ruleset {
	r := ruleset{chains: map[string][]string{}, places: map[string]place{}}
	for _, t := range tables {
		for _, c := range t.chains {
			r.chains[c] = nil
		}
		for _, h := range t.hooks {
			r.places[t.name+" "+h.base] = place{jumps: []string{h.jump(v6)}}
		}
	}
	return r
}

func (r ruleset) empty() bool {
	return len(r.chains) == 0 && !slices.ContainsFunc(tables, func(t table) bool {
		return slices.ContainsFunc(t.hooks, func(h hook) bool { return len(r.places[t.name+" "+h.base].jumps) > 0 })
	})
}

// placeOf finds our jumps in the rules of a built-in chain.
func placeOf(h hook, rules []string, v6 bool) place {
	p := place{at: 1}
	for i, rule := range rules {
		switch {
		case rule == "-j "+h.chain || strings.HasSuffix(rule, " -j "+h.chain):
			p.jumps = append(p.jumps, rule)
		case len(p.jumps) > 0:
		case h.harmless == nil || !h.harmless(rule):
			p.late = true
		case i == 0 && rule == h.after:
			p.at = 2
		}
	}
	return p
}

// diff is the input for iptables-restore --noflush that makes want of have; "" when they are the same. Each table
// changes in one piece: no packet meets half of it.
func diff(have, want ruleset) string {
	var b strings.Builder
	for _, t := range tables {
		if lines := t.diff(have, want); len(lines) > 0 {
			fmt.Fprintf(&b, "*%s\n%s\nCOMMIT\n", t.name, strings.Join(lines, "\n"))
		}
	}
	return b.String()
}

func (t table) diff(have, want ruleset) []string {
	var create, change, jump, flush, remove []string
	for _, c := range t.chains {
		old, exists := have.chains[c]
		rules, wanted := want.chains[c]
		switch {
		case wanted && !exists:
			create = append(create, fmt.Sprintf(":%s - [0:0]", c))
		case exists && !wanted:
			flush = append(flush, "-F "+c)
			remove = append(remove, "-X "+c)
			continue
		}
		change = append(change, diffChain(c, old, rules)...)
	}
	for _, h := range t.hooks {
		old, place := have.places[t.name+" "+h.base], want.places[t.name+" "+h.base]
		if slices.Equal(old.jumps, place.jumps) && !old.late {
			continue
		}
		for _, rule := range old.jumps {
			jump = append(jump, fmt.Sprintf("-D %s %s", h.base, rule))
		}
		for _, rule := range place.jumps {
			jump = append(jump, fmt.Sprintf("-I %s %d %s", h.base, max(old.at, 1), rule))
		}
	}
	return slices.Concat(create, change, jump, flush, remove)
}

// diffChain deletes before it adds, so that an address that moves to another container is never in two rules.
func diffChain(chain string, have, want []string) []string {
	var lines []string
	left := slices.Clone(want)
	for _, rule := range have {
		if i := slices.Index(left, rule); i >= 0 {
			left = slices.Delete(left, i, i+1)
		} else {
			lines = append(lines, fmt.Sprintf("-D %s %s", chain, rule))
		}
	}
	for _, rule := range left {
		lines = append(lines, fmt.Sprintf("-A %s %s", chain, rule))
	}
	return lines
}
