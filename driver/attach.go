package driver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/endpoint"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/undo"
)

// Container is what an engine tells of a container beyond its endpoint.
type Container struct {
	ID      string   `json:"id"`
	Name    string   `json:"name,omitempty"`
	Aliases []string `json:"aliases,omitempty"` // further names on this network
}

// Attachment is a wish to put a container on a network, from an engine that leaves it to us to configure the container's
// interface and describes the network with each of them.
type Attachment struct {
	Network     usernet.Network
	NetworkName string           // for people; may be empty
	Endpoint    usernet.Endpoint // its IfName is needed; its addresses are in Addresses
	Container   Container
	Netns       *netns.NS    // the container's; open until Attach returns
	Sandbox     string       // its path; needed on foreign networks, to see when it goes
	Addresses   []netip.Addr // none: one of each subnet is chosen
	Metric      int          // of the default routes
	NoDefault   bool         // no default routes
	Routes      []Route
	Ports       []usernet.Port // to publish
	Limits      Limits         // of what the container sends and receives
	Names       bool           // the engine wants names to be resolved on the network
	Domains     []string       // that names are in as well: db is also db.DOMAIN
	Upstream    []netip.Addr   // DNS servers for other names; none: the host's
}

// Route is a route that is wanted in a container.
type Route = endpoint.Route

// Limits bound what a container sends and receives.
type (
	Limits = endpoint.Limits
	Rate   = endpoint.Rate
)

// LinkAlias is the alias of a container's interface that Attach has made.
const LinkAlias = endpoint.Alias

// MinRate is the least rate that a container can be limited to, in bits per second.
const MinRate = endpoint.MinRate

// Attached is what an attached container has.
type Attached struct {
	Endpoint  usernet.Endpoint
	Addresses []netip.Prefix
	Gateways  []netip.Addr // of the subnet of each address; zero: it has none
	DNS       []netip.Addr // servers for the container to ask; none: those of the host
	Search    []string     // domains
}

// Attach puts a container on a network, which is made if it is not there, and publishes the ports. An endpoint of
// that ID that is there already makes room, as if it had been detached.
func (d *Driver) Attach(_ context.Context, want Attachment) (_ Attached, err error) {
	n, err := d.ensure(want)
	if err != nil {
		return Attached{}, err
	}
	defer n.mu.Unlock()
	defer n.kick() // a transient network that got no endpoint goes again
	if n.segment == nil {
		return Attached{}, errNotUp(n)
	}
	if old := n.containers[want.Endpoint.ID]; old != nil {
		if err := n.detach(old, want.Netns); err != nil {
			return Attached{}, err
		}
	}
	if err := n.setNaming(want); err != nil {
		return Attached{}, err
	}
	c := &container{Endpoint: want.Endpoint, owner: want.Container, routes: want.Routes, sandboxKey: want.Sandbox, joined: true, moved: true, since: time.Now()}
	c.NetworkID = n.ID
	if c.sandboxGone() {
		return Attached{}, fmt.Errorf("%w: from here there is no network namespace at %s", usernet.ErrInvalid, want.Sandbox)
	}
	if err := n.place(c, want.Addresses); err != nil {
		return Attached{}, err
	}
	if err := n.address(c); err != nil {
		return Attached{}, err
	}
	if err := n.attach(c, want); err != nil {
		return Attached{}, err
	}
	got := Attached{Endpoint: c.Endpoint, Addresses: c.addresses()}
	for _, a := range got.Addresses {
		got.Gateways = append(got.Gateways, n.gatewayFor(a))
	}
	n.names.add(c)
	if !want.Names {
		return got, nil
	}
	if got.DNS = n.names.servers(got.Gateways); len(got.DNS) > 0 {
		got.Search = want.Domains
	}
	return got, nil
}

// attach does to the kernel and the store what is to be done for a container that has its addresses.
func (n *network) attach(c *container, want Attachment) (err error) {
	var steps undo.List
	defer func() {
		if err != nil {
			delete(n.containers, c.ID)
			err = errors.Join(err, steps.Close())
		}
	}()
	saved := saveEndpoint(c)
	saved.Creating = true
	if err := n.driver.store.putEndpoint(saved); err != nil {
		return err
	}
	steps.Push(func() error { return n.driver.store.deleteEndpoint(n.ID, c.ID) })
	at := endpoint.Place{Netns: want.Netns, Addresses: c.addresses(), Metric: want.Metric, Routes: want.Routes, Limits: want.Limits}
	if !n.Internal && !want.NoDefault {
		at.Gateways = n.defaultRoutes(c)
	}
	link, err := n.segment.Attach(c.Endpoint, at)
	if err != nil {
		return err
	}
	steps.Push(link.Close)
	c.gateway = link.First
	n.containers[c.ID] = c
	if n.Internal {
		return n.save(c) // nothing leads in there
	}
	if err := n.publish(c, want.Ports, false); err != nil {
		return err
	}
	steps.Push(func() error { return n.unpublish(c, func(*published) bool { return true }) })
	return n.save(c)
}

// ensure returns the network that an attachment describes with its lock held. One that is there with other settings
// gives way if nobody is on it: the engine has removed it and made another one.
func (d *Driver) ensure(want Attachment) (*network, error) {
	for {
		n, err := d.lock(want.Network.ID)
		switch {
		case err == nil && n.is(want.Network):
			return n, nil
		case err == nil:
			n.sweepLocked()
			if !n.transient || len(n.containers) > 0 {
				n.mu.Unlock()
				return nil, fmt.Errorf("network %.12s: %w with other settings, and containers are on it", n.ID, usernet.ErrExists)
			}
			err := n.removeLocked()
			n.mu.Unlock()
			if err != nil {
				return nil, err
			}
		case !errors.Is(err, usernet.ErrNotFound):
			return nil, err
		}
		n = d.newNetwork(want.Network)
		n.name, n.transient = want.NetworkName, true
		old, err := d.create(n)
		if err != nil {
			return nil, err
		}
		if old == nil {
			return n, nil
		}
	}
}

// place gives a container the addresses that the engine brought: they must be of the network and nobody else's.
func (n *network) place(c *container, addrs []netip.Addr) error {
	for _, a := range addrs {
		p := netip.PrefixFrom(a, a.BitLen())
		if !n.foreign() {
			s, ok := n.SubnetOf(a)
			if !ok {
				return fmt.Errorf("%w: address %s is in none of the network's subnets", usernet.ErrInvalid, a)
			}
			p = netip.PrefixFrom(a, s.Prefix.Bits())
		}
		switch {
		case a.Is4() && !c.Addr4.IsValid():
			c.Addr4 = p
		case a.Is6() && !c.Addr6.IsValid():
			c.Addr6 = p
		default:
			c.more = append(c.more, p)
		}
	}
	return nil
}

// defaultRoutes are the gateways of a container's first address of each family.
func (n *network) defaultRoutes(c *container) []netip.Addr {
	var gws []netip.Addr
	for _, a := range []netip.Prefix{c.Addr4, c.Addr6} {
		if !a.IsValid() {
			continue
		}
		if gw := n.gatewayFor(a); gw.IsValid() {
			gws = append(gws, gw)
		}
	}
	return gws
}

// Detach takes a container off a network with all that it has there. ns is its namespace, or nil if that is gone. What
// is not known is gone already.
func (d *Driver) Detach(_ context.Context, networkID, id string, ns *netns.NS) error {
	return d.teardown(networkID, id, func(n *network, c *container) error {
		defer n.kick() // it may have been the last one
		return n.detach(c, ns)
	})
}

// detach takes a container off the network; ns may be nil. The kernel takes its time over a link (it waits for all
// processors), and the firewall over its rules, so they go at the same time.
func (n *network) detach(c *container, ns *netns.NS) error {
	var link errgroup.Group
	if n.segment != nil {
		place := endpoint.Place{Netns: ns, Addresses: c.addresses(), Routes: c.routes}
		link.Go(func() error { return n.segment.Detach(c.Endpoint, place) })
	}
	err := n.unpublish(c, func(*published) bool { return true })
	if err := errors.Join(err, link.Wait()); err != nil {
		return err
	}
	return n.removeContainer(c)
}
