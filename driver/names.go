package driver

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/dns"
	"github.com/usernet/usernet/internal/undo"
)

const dnsPort = 53

// naming is what an engine wants of the names on a network.
type naming struct {
	Domains  []string     `json:"domains,omitempty"`  // that names are in as well
	Upstream []netip.Addr `json:"upstream,omitempty"` // servers for other names; none: the host's
}

func (a *naming) is(b *naming) bool {
	return b != nil && slices.Equal(a.Domains, b.Domains) && slices.Equal(a.Upstream, b.Upstream)
}

// names is the resolver of one network. Its methods may be called of nil: a network without one.
type names struct {
	subnets   []netip.Prefix
	records   *dns.Records
	resolver  *dns.Resolver
	directory *directory

	ctx     context.Context
	cancel  context.CancelFunc
	serving sync.WaitGroup

	mu   sync.Mutex
	at   []netip.Addr          // the gateway's addresses where it listens
	errs map[netip.Addr]string // why it does not listen at others
}

// setNaming takes what an engine says about names with a container, and sees that the resolver serves that. A container
// that wants none takes nothing from the others.
func (n *network) setNaming(want Attachment) error {
	now := &naming{Domains: want.Domains, Upstream: want.Upstream}
	if !want.Names || now.is(n.naming) {
		return n.serveNames()
	}
	n.stopNames()
	n.naming = now
	if err := n.driver.store.putNetwork(n.saved()); err != nil {
		return err
	}
	n.startNames()
	return n.applyRules()
}

// serveNames makes the resolver listen where it should and does not yet.
func (n *network) serveNames() error {
	if !n.startNames() {
		return nil
	}
	return n.applyRules()
}

// retryNames is serveNames in the keeper's time: somebody may have let go of the port.
func (n *network) retryNames() {
	if err := n.serveNames(); err != nil {
		n.driver.cfg.Log.Error("firewall is not up to date", "network", shortID(n.ID), "error", err)
	}
}

// startNames is serveNames but for the firewall, and tells whether that has to know.
func (n *network) startNames() (changed bool) {
	if n.naming == nil || n.segment == nil {
		return false
	}
	if n.names == nil {
		n.names = n.newNames()
		for _, c := range n.containers {
			n.names.add(c)
		}
	}
	for _, s := range n.Subnets {
		if s.Gateway.IsValid() && !slices.Contains(n.names.listening(), s.Gateway) {
			changed = n.listenNames(s.Gateway) || changed
		}
	}
	return changed
}

func (n *network) newNames() *names {
	var gateways []netip.Addr
	s := &names{directory: &n.driver.directory, errs: map[netip.Addr]string{}}
	for _, sub := range n.Subnets {
		s.subnets = append(s.subnets, sub.Prefix)
		if sub.Gateway.IsValid() {
			gateways = append(gateways, sub.Gateway)
		}
	}
	s.ctx, s.cancel = context.WithCancel(n.ctx)
	s.records = dns.NewRecords(dns.Network{Domains: n.naming.Domains, Subnets: s.subnets, Gateway: gateways})
	cfg := dns.Config{Sources: []dns.Source{s.records}, Client: s.client, Log: n.driver.cfg.Log.With("network", shortID(n.ID))}
	if !n.Internal {
		cfg.Sources = []dns.Source{hostNames{n.driver.blocked}, s.records}
		cfg.Servers, cfg.Dial = n.upstream(gateways)
	}
	s.resolver = dns.New(cfg)
	return s
}

// upstream are the servers for other names, and how they are reached: from the host, but one that is on the usermode
// network itself.
func (n *network) upstream(gateways []netip.Addr) (servers func() []netip.AddrPort, dial func(context.Context, string, string) (net.Conn, error)) {
	var own []netip.AddrPort
	inside := map[string]bool{}
	for _, a := range n.naming.Upstream {
		if slices.Contains(gateways, a) { // that is us
			continue
		}
		at := netip.AddrPortFrom(a, dnsPort)
		own = append(own, at)
		if _, ok := n.SubnetOf(a); ok && n.Options.Mode == usernet.Usermode {
			inside[at.String()] = true
		}
	}
	if len(own) == 0 {
		return n.driver.resolvers.Servers, nil
	}
	servers = func() []netip.AddrPort { return own }
	if len(inside) == 0 {
		return servers, nil
	}
	ns := n.segment.Gateway().Netns()
	return servers, func(ctx context.Context, network, address string) (c net.Conn, err error) {
		var d net.Dialer
		if !inside[address] {
			return d.DialContext(ctx, network, address)
		}
		err = ns.Do(func() (err error) {
			c, err = d.DialContext(ctx, network, address)
			return err
		})
		return c, err
	}
}

// listenNames makes the resolver listen at one of the gateway's addresses, and tells whether it does.
func (n *network) listenNames(at netip.Addr) bool {
	s, log := n.names, n.driver.cfg.Log.With("network", shortID(n.ID), "address", netip.AddrPortFrom(at, dnsPort))
	udp, tcp, err := n.resolverSockets(at)
	if err != nil {
		if s.refused(at, err) {
			log.Error("names are not resolved there", "error", err)
		}
		return false
	}
	s.admitted(at)
	s.serving.Go(func() {
		if err := s.resolver.Serve(s.ctx, udp, tcp); err != nil {
			log.Error("the resolver has stopped", "error", err)
			waitFor(s.ctx, time.Second) // what fails at once must not be tried at once, over and over
			s.refused(at, err)
			n.kick()
		}
	})
	return true
}

// resolverSockets are bound where the bridge is: in the fabric, or on the host.
func (n *network) resolverSockets(at netip.Addr) (udp net.PacketConn, tcp net.Listener, err error) {
	var steps undo.List
	listen := func() error {
		addr := netip.AddrPortFrom(at, dnsPort).String()
		if udp, err = net.ListenPacket("udp", addr); err != nil {
			return err
		}
		steps.Push(udp.Close)
		tcp, err = net.Listen("tcp", addr)
		return err
	}
	if g := n.segment.Gateway(); g != nil {
		err = g.Netns().Do(listen)
	} else {
		err = listen()
	}
	if err != nil {
		return nil, nil, errors.Join(err, steps.Close())
	}
	return udp, tcp, nil
}

// stopNames ends the resolver. What is not answered yet is not going to be.
func (n *network) stopNames() {
	s := n.names
	if s == nil {
		return
	}
	n.names = nil
	s.cancel()
	s.serving.Wait()
	s.directory.forget(s)
}

// listening are the addresses at which the resolver can be asked.
func (s *names) listening() []netip.Addr {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.at)
}

// problems tells why it cannot be asked at others.
func (s *names) problems() string {
	if s == nil {
		return ""
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []string
	for _, text := range s.errs {
		all = append(all, text)
	}
	slices.Sort(all)
	return strings.Join(all, "; ")
}

// servers are those of the gateways that a container can ask.
func (s *names) servers(gateways []netip.Addr) []netip.Addr {
	var at []netip.Addr
	for _, gw := range gateways {
		if slices.Contains(s.listening(), gw) && !slices.Contains(at, gw) {
			at = append(at, gw)
		}
	}
	return at
}

func (s *names) admitted(at netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at = append(s.at, at)
	delete(s.errs, at)
}

// refused notes that the resolver does not listen at an address, and tells whether that is news.
func (s *names) refused(at netip.Addr, err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at = slices.DeleteFunc(s.at, func(a netip.Addr) bool { return a == at })
	news := s.errs[at] != err.Error()
	s.errs[at] = err.Error()
	return news
}

// add makes a container known by its names.
func (s *names) add(c *container) {
	if s == nil {
		return
	}
	e := dns.Entry{Names: append([]string{c.owner.Name}, c.owner.Aliases...)}
	for _, p := range c.addresses() {
		e.Addrs = append(e.Addrs, p.Addr())
	}
	s.records.Set(c.ID, e)
	s.directory.enter(s, c.owner.ID, e.Addrs)
}

// remove forgets a container.
func (s *names) remove(c *container) {
	if s == nil {
		return
	}
	s.records.Delete(c.ID)
	for _, p := range c.addresses() {
		s.directory.leave(s, p.Addr())
	}
}

// client answers those who are on the network, and the host, which asks from an address of its own there. A bridge
// network's gateway is an address of the host, where others reach it as well.
func (s *names) client(a netip.Addr) (others []*dns.Resolver, ok bool) {
	a = a.Unmap()
	if !slices.ContainsFunc(s.subnets, func(p netip.Prefix) bool { return p.Contains(a) }) {
		return nil, false
	}
	return s.directory.others(s, a), true
}
