// Package firewall declares the rules of the host's firewall that networks of mode bridge need: published ports,
// masquerade, and who may reach whom. They live in chains of our own, reached by jumps from the built-in ones, next to
// Docker's and anybody else's, and go as a whole. It watches nothing and knows nothing of containers: the caller
// says what the networks are.
//
//	mangle FORWARD      → USERNET-ISOLATE      what must not pass
//	filter FORWARD      → USERNET-FORWARD      what may pass, where the policy is DROP
//	filter INPUT        → USERNET-INPUT        questions to resolvers at the gateways, where the policy is DROP
//	nat    PREROUTING   → USERNET-DNAT         published ports
//	nat    OUTPUT       → USERNET-DNAT         published ports, from the host itself
//	nat    POSTROUTING  → USERNET-POSTROUTING  masquerade
//
// Isolation is decided in mangle, because Docker's filter rules accept whatever comes from a bridge of Docker's and
// are put back to the top of FORWARD whenever Docker likes. A packet that mangle dropped no longer cares about their order.
package firewall

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"

	"github.com/coreos/go-iptables/iptables"

	"github.com/usernet/usernet"
)

// Forward is one published port.
type Forward struct {
	Proto    usernet.Proto
	HostIP   netip.Addr // zero: every address of the host, of Target's family; loopback: no rule, the relay serves it
	HostPort uint16
	Target   netip.AddrPort // the container's
}

// Network is one network of mode bridge.
type Network struct {
	Bridge     string
	Subnets    []netip.Prefix
	Internal   bool // nothing is routed into or out of it; Masquerade and Forwards are ignored
	Masquerade bool
	Source4    netip.Addr // the address masqueraded packets take; zero: the kernel's choice
	Source6    netip.Addr
	Forwards   []Forward
	Resolver   []netip.Addr // where on the host the network's containers ask for names; on internal networks, too
}

// State is everything the firewall is to do.
type State struct {
	Networks []Network
	// Foreign names other container bridges of this host (Docker's, Podman's): our containers must not open
	// connections to what is on them.
	Foreign []string
}

// Firewall is our part of the host's firewall. It is safe for concurrent use.
type Firewall struct {
	log *slog.Logger

	// mu covers a whole operation: two writers would each compute their difference to a state that the other changes.
	mu       sync.Mutex
	families []*family // IPv4 and, where there is ip6tables, IPv6
	active   bool      // between the first Set and Close
}

// New finds iptables and ip6tables, whichever variant (nft or legacy) the host uses, and changes nothing. Without
// ip6tables IPv6 has no rules; without iptables it fails.
func New(log *slog.Logger) (*Firewall, error) {
	v4, err := newFamily(iptables.ProtocolIPv4)
	if err != nil {
		return nil, fmt.Errorf("networks of mode bridge need iptables (install the package iptables): %w", err)
	}
	f := &Firewall{log: log, families: []*family{v4}}
	v6, err := newFamily(iptables.ProtocolIPv6)
	if err != nil {
		log.Warn("no ip6tables: networks of mode bridge have no IPv6", "err", err)
		return f, nil
	}
	f.families = append(f.families, v6)
	return f, nil
}

// Set makes the kernel's rules those that want needs and remembers them, so that the next Set applies only what is
// different: at most one iptables-restore per address family. The first Set compares with the kernel and thereby
// removes what an earlier process left behind. Chains and jumps exist as long as a network of their family does.
func (f *Firewall) Set(want State) error {
	if err := want.check(); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.active = true
	var errs []error
	for _, fam := range f.families {
		if err := fam.set(rules(want, fam.v6)); err != nil {
			errs = append(errs, fmt.Errorf("set %s rules: %w", fam, err))
		}
	}
	return errors.Join(errs...)
}

// Check compares the kernel's rules with those last set, and puts back what somebody flushed, deleted, added to our
// chains, or pushed down in the built-in ones. It reports whether that was necessary. Before the first Set it does
// nothing.
func (f *Firewall) Check() (repaired bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.active {
		return false, nil
	}
	var errs []error
	for _, fam := range f.families {
		did, err := fam.repair()
		if err != nil {
			errs = append(errs, fmt.Errorf("check %s rules: %w", fam, err))
		}
		repaired = repaired || did
	}
	return repaired, errors.Join(errs...)
}

// Close takes everything of ours away: rules, jumps, chains. Set may be called again afterwards.
func (f *Firewall) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.active = false
	var errs []error
	for _, fam := range f.families {
		if err := fam.remove(); err != nil {
			errs = append(errs, fmt.Errorf("remove %s rules: %w", fam, err))
		}
	}
	return errors.Join(errs...)
}

// check refuses what cannot be written as a rule: a trailing + would make a name a pattern, and iptables-restore
// gives quotes and blanks a meaning of their own.
func (s State) check() error {
	for _, n := range s.Networks {
		if !plain(n.Bridge) {
			return fmt.Errorf("bridge name %q cannot be used in a firewall rule: %w", n.Bridge, usernet.ErrInvalid)
		}
		for _, f := range n.Forwards {
			if !f.valid() {
				return fmt.Errorf("forward %+v on %s: %w", f, n.Bridge, usernet.ErrInvalid)
			}
		}
	}
	return nil
}

func plain(name string) bool {
	return name != "" && len(name) < 16 && name[0] != '-' && !strings.ContainsAny(name, "+!\"'\\/ \t\r\n\v\f")
}
