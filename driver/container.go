package driver

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/endpoint"
	"github.com/usernet/usernet/internal/netns"
	"github.com/usernet/usernet/internal/undo"
	"github.com/usernet/usernet/ipam"
)

// container is one endpoint's row: what was asked for and what it has. The network's lock guards it.
type container struct {
	usernet.Endpoint
	owner      Container      // what the engine told of the container; zero for Docker, which tells nothing
	more       []netip.Prefix // addresses beyond one of each family
	routes     []Route        // that were asked for with it
	joined     bool
	sandboxKey string // path of the container's namespace; it need not exist when Join is called (Docker ≤ 27)
	gateway    bool   // the engine published through this endpoint: the container's default route leads to us
	ports      []*published
	since      time.Time // when it came to its present state, for the sweeper
	moved      bool      // its link was seen in a container since Join; it is not any more: it was handed back
}

// CreateEndpoint gives a container a place on a network and makes its link. The answer has the addresses and the MAC
// address filled in. Asked again for the same endpoint, it answers the same.
func (d *Driver) CreateEndpoint(_ context.Context, want usernet.Endpoint) (_ usernet.Endpoint, err error) {
	n, err := d.lock(want.NetworkID)
	if err != nil {
		return usernet.Endpoint{}, err
	}
	defer n.mu.Unlock()
	if n.segment == nil {
		return usernet.Endpoint{}, errNotUp(n)
	}
	if c := n.containers[want.ID]; c != nil {
		return c.Endpoint, nil
	}
	c := &container{Endpoint: want, since: time.Now()}
	if err := n.address(c); err != nil {
		return usernet.Endpoint{}, err
	}
	var steps undo.List
	defer func() {
		if err != nil {
			delete(n.containers, c.ID)
			err = errors.Join(err, steps.Close())
		}
	}()
	saved := saveEndpoint(c)
	saved.Creating = true
	if err := d.store.putEndpoint(saved); err != nil {
		return usernet.Endpoint{}, err
	}
	steps.Push(func() error { return d.store.deleteEndpoint(n.ID, c.ID) })
	link, err := n.segment.Connect(c.Endpoint)
	if err != nil {
		return usernet.Endpoint{}, err
	}
	steps.Push(link.Close)
	n.containers[c.ID] = c
	return c.Endpoint, n.save(c)
}

// address chooses what the engine left open and sees that nobody else has what it brought.
func (n *network) address(c *container) error {
	for _, a := range c.addresses() {
		if s, ok := n.SubnetOf(a.Addr()); ok && s.Gateway == a.Addr() {
			return fmt.Errorf("%w: address %s is the network's gateway", usernet.ErrInvalid, a.Addr())
		}
		if err := n.evict(a.Addr()); err != nil {
			return err
		}
	}
	if !c.Addr4.IsValid() && !c.Addr6.IsValid() {
		for _, s := range n.Subnets {
			a := &c.Addr4
			if s.Prefix.Addr().Is6() {
				a = &c.Addr6
			}
			if a.IsValid() {
				continue
			}
			addr, err := ipam.Next(s, func(x netip.Addr) bool { return n.holder(x) != nil })
			if err != nil {
				return err
			}
			*a = netip.PrefixFrom(addr, s.Prefix.Bits())
		}
	}
	if c.MAC == nil {
		c.MAC = macFor(c.Endpoint)
	}
	return nil
}

// evict makes room for an engine that gives out an address again: after a crash Docker forgets endpoints without a
// word and reuses their addresses. One whose container is alive stays.
func (n *network) evict(a netip.Addr) error {
	old := n.holder(a)
	if old == nil {
		return nil
	}
	alive, err := n.alive(old)
	if err != nil {
		return err
	}
	if alive {
		return fmt.Errorf("address %s: %w, endpoint %.12s has it", a, usernet.ErrExists, old.ID)
	}
	n.driver.cfg.Log.Info("the engine forgot an endpoint", "endpoint", old.ID, "address", a)
	return n.removeContainer(old)
}

// alive tells whether a container has the endpoint's link.
func (n *network) alive(c *container) (bool, error) {
	if n.segment == nil {
		return false, nil
	}
	if n.foreign() {
		return !c.sandboxGone(), nil
	}
	state, err := n.segment.Link(c.Endpoint).State()
	return state == endpoint.Moved && !c.sandboxGone(), err
}

func (n *network) holder(a netip.Addr) *container {
	for _, c := range n.containers {
		if slices.ContainsFunc(c.addresses(), func(p netip.Prefix) bool { return p.Addr() == a }) {
			return c
		}
	}
	return nil
}

// addresses are all that the endpoint has.
func (c *container) addresses() []netip.Prefix {
	var as []netip.Prefix
	for _, a := range append([]netip.Prefix{c.Addr4, c.Addr6}, c.more...) {
		if a.IsValid() {
			as = append(as, a)
		}
	}
	return as
}

// sandboxGone tells whether there is no namespace at the sandbox's path. Docker up to 20.10 unmounts it and leaves the
// file for a minute.
func (c *container) sandboxGone() bool {
	if c.sandboxKey == "" {
		return false
	}
	there, err := netns.At(c.sandboxKey)
	return err == nil && !there
}

// macFor is the locally administered MAC address that goes with the endpoint's IP address, the same in every life of a
// container, as Docker's bridge had it until 27: neighbours then need not be told when an address gets a new owner, which
// Docker does since 28 only, and which takes them up to ten seconds to find out (RFC 4861 §7.3).
func macFor(ep usernet.Endpoint) net.HardwareAddr {
	if ep.Addr4.IsValid() {
		a := ep.Addr4.Addr().As4()
		return net.HardwareAddr{0x02, 0x42, a[0], a[1], a[2], a[3]}
	}
	if ep.Addr6.IsValid() {
		sum := sha256.Sum256(ep.Addr6.Addr().AsSlice())
		return net.HardwareAddr{0x02, 0x42, sum[0], sum[1], sum[2], sum[3]}
	}
	mac := net.HardwareAddr{0x02, 0x42, 0, 0, 0, 0}
	rand.Read(mac[2:])
	return mac
}

// DeleteEndpoint takes an endpoint away with all it has. One that is not known is gone already.
func (d *Driver) DeleteEndpoint(_ context.Context, networkID, id string) error {
	return d.teardown(networkID, id, (*network).removeContainer)
}

// Leave takes a container off its endpoint: its ports are released, the link is left for the engine to hand back.
func (d *Driver) Leave(_ context.Context, networkID, id string) error {
	return d.teardown(networkID, id, func(n *network, c *container) error {
		if err := n.unpublish(c, func(*published) bool { return true }); err != nil {
			return err
		}
		c.joined, c.moved, c.gateway, c.sandboxKey, c.since = false, false, false, "", time.Now()
		return n.save(c)
	})
}

// teardown does something to an endpoint if it is there.
func (d *Driver) teardown(networkID, id string, do func(*network, *container) error) error {
	n, err := d.lock(networkID)
	if errors.Is(err, usernet.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer n.mu.Unlock()
	c := n.containers[id]
	if c == nil {
		return nil
	}
	return do(n, c)
}

// container returns an endpoint with its network's lock held.
func (d *Driver) container(networkID, id string) (*network, *container, error) {
	n, err := d.lock(networkID)
	if err != nil {
		return nil, nil, err
	}
	if n.segment == nil {
		n.mu.Unlock()
		return nil, nil, errNotUp(n)
	}
	c := n.containers[id]
	if c == nil {
		n.mu.Unlock()
		return nil, nil, fmt.Errorf("endpoint %.12s: %w", id, usernet.ErrNotFound)
	}
	return n, c, nil
}

func errNotUp(n *network) error {
	return fmt.Errorf("network %.12s could not be brought back; usernet's log says why", n.ID)
}

// Join says how the container's end of the link becomes its interface.
func (d *Driver) Join(_ context.Context, networkID, id, sandboxKey string) (usernet.Attachment, error) {
	n, c, err := d.container(networkID, id)
	if err != nil {
		return usernet.Attachment{}, err
	}
	defer n.mu.Unlock()
	state, err := n.segment.Link(c.Endpoint).State()
	if err != nil {
		return usernet.Attachment{}, err
	}
	if state == endpoint.Gone {
		if _, err := n.segment.Connect(c.Endpoint); err != nil {
			return usernet.Attachment{}, err
		}
	}
	c.joined, c.moved, c.sandboxKey, c.since = true, false, sandboxKey, time.Now()
	if err := n.save(c); err != nil {
		return usernet.Attachment{}, err
	}
	at := usernet.Attachment{SrcName: c.PeerName(), DstName: c.IfName, DstPrefix: n.Options.IfacePrefix}
	if at.DstPrefix == "" {
		at.DstPrefix = "eth"
	}
	if !n.Internal {
		at.Gateway4, at.Gateway6 = n.gatewayFor(c.Addr4), n.gatewayFor(c.Addr6)
	}
	return at, nil
}

func (n *network) gatewayFor(a netip.Prefix) netip.Addr {
	s, _ := n.SubnetOf(a.Addr())
	return s.Gateway
}

// save writes an endpoint's record.
func (n *network) save(c *container) error { return n.driver.store.putEndpoint(saveEndpoint(c)) }

// removeContainer takes an endpoint out of the kernel, the table and the store. It may be repeated.
func (n *network) removeContainer(c *container) error {
	if err := n.unpublish(c, func(*published) bool { return true }); err != nil {
		return err
	}
	if n.segment != nil {
		if err := n.segment.Link(c.Endpoint).Close(); err != nil {
			return err
		}
	}
	if err := n.driver.store.deleteEndpoint(n.ID, c.ID); err != nil {
		return err
	}
	delete(n.containers, c.ID)
	n.names.remove(c)
	return nil
}
