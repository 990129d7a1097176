package driver

import (
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/firewall"
	"github.com/usernet/usernet/internal/hostnet"
)

// rules collects what every bridge network wants of the host's firewall and declares it as a whole. The firewall is
// opened when the first network needs it: a host with usermode networks only needs no iptables.
type rules struct {
	log *slog.Logger

	subnets atomic.Pointer[[]netip.Prefix] // of all networks; read for every new flow

	mu       sync.Mutex // held while rules are applied, which is slow; nothing on a data path takes it
	held     bool       // only collect, until resume
	fw       *firewall.Firewall
	networks []networkRules // by ID, so that the same wants make the same state
	foreign  []string
}

type networkRules struct {
	id string
	firewall.Network
}

// set declares what one network wants.
func (r *rules) set(id string, want firewall.Network) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	i, found := r.find(id)
	if found {
		r.networks[i].Network = want
	} else {
		r.networks = slices.Insert(r.networks, i, networkRules{id, want})
	}
	return r.applyLocked()
}

// remove withdraws what a network wants. One that is not known wants nothing.
func (r *rules) remove(id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	i, found := r.find(id)
	if !found {
		return nil
	}
	r.networks = slices.Delete(r.networks, i, i+1)
	return r.applyLocked()
}

func (r *rules) find(id string) (int, bool) {
	return slices.BinarySearchFunc(r.networks, id, func(n networkRules, id string) int {
		switch {
		case n.id < id:
			return -1
		case n.id > id:
			return 1
		}
		return 0
	})
}

// setForeign tells which bridges on the host belong to others.
func (r *rules) setForeign(bridges []hostnet.Bridge) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.foreign = nil
	for _, b := range bridges {
		r.foreign = append(r.foreign, b.Name)
	}
	slices.Sort(r.foreign)
	if r.fw == nil {
		return
	}
	if err := r.applyLocked(); err != nil {
		r.log.Error("firewall is not up to date", "error", err)
	}
}

// resume ends the collecting that held began: the restart of a daemon declares everything at once, so that no
// network's rules are missing while another's are worked on.
func (r *rules) resume() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held = false
	return r.applyLocked()
}

func (r *rules) applyLocked() error {
	var subnets []netip.Prefix
	for _, n := range r.networks {
		subnets = append(subnets, n.Subnets...)
	}
	r.subnets.Store(&subnets)
	if r.held {
		return nil
	}
	if len(r.networks) == 0 && r.fw == nil {
		return nil
	}
	if err := r.openLocked(); err != nil {
		return err
	}
	state := firewall.State{Foreign: r.foreign}
	for _, n := range r.networks {
		state.Networks = append(state.Networks, n.Network)
	}
	return r.fw.Set(state)
}

func (r *rules) openLocked() (err error) {
	if r.fw == nil {
		r.fw, err = firewall.New(r.log)
	}
	return err
}

// check repairs what others have done to our rules.
func (r *rules) check() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fw == nil {
		return
	}
	repaired, err := r.fw.Check()
	switch {
	case err != nil:
		r.log.Error("firewall is not checked", "error", err)
	case repaired:
		r.log.Info("somebody changed the firewall; our rules are back")
	}
}

// contains tells whether a is an address of a bridge network of ours.
func (r *rules) contains(a netip.Addr) bool {
	subnets := r.subnets.Load()
	return subnets != nil && slices.ContainsFunc(*subnets, func(p netip.Prefix) bool { return p.Contains(a) })
}

// enableForwarding makes the host's kernel forward packets, as a bridge network needs.
func (r *rules) enableForwarding(n usernet.Network) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.openLocked(); err != nil {
		return err
	}
	return r.fw.EnableForwarding(slices.ContainsFunc(n.Subnets, func(s usernet.Subnet) bool { return s.Prefix.Addr().Is6() }))
}

// applyRules declares the network's rules. Only bridge networks have any.
func (n *network) applyRules() error {
	if n.Options.Mode != usernet.Bridge {
		return nil
	}
	want := firewall.Network{
		Bridge:     n.BridgeName(),
		Internal:   n.Internal,
		Masquerade: n.Options.Masquerade,
		Source4:    n.Options.Source4,
		Source6:    n.Options.Source6,
		Resolver:   n.names.listening(),
	}
	for _, s := range n.Subnets {
		want.Subnets = append(want.Subnets, s.Prefix)
	}
	for _, c := range n.containers {
		want.Forwards = append(want.Forwards, c.forwards(c.ports)...)
	}
	return n.driver.rules.set(n.ID, want)
}

// flushUDP makes the kernel forget the UDP flows of ports that were just published or released, as far as it translates
// their addresses: they would go on to where they went before. It matters only to clients that keep sending from one
// port; failing is not worth more than a line in the log.
func (n *network) flushUDP(ports []*published) {
	var fs []firewall.Forward
	for _, p := range ports {
		if p.Proto == usernet.UDP && (p.Held || n.Options.Mode == usernet.Bridge) {
			fs = append(fs, firewall.Forward{Proto: p.Proto, HostIP: p.HostIP, HostPort: p.HostPort})
		}
	}
	if len(fs) == 0 {
		return
	}
	if err := firewall.FlushUDP(fs); err != nil {
		n.driver.cfg.Log.Warn("old UDP flows may go astray", "network", shortID(n.ID), "error", err)
	}
}
