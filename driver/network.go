package driver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"sync"
	"sync/atomic"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/endpoint"
	"github.com/usernet/usernet/internal/hostnet"
	"github.com/usernet/usernet/internal/undo"
	"github.com/usernet/usernet/ipam"
)

// network is one row of the table.
type network struct {
	usernet.Network        // never changes once the network is in the table
	name            string // the engine's, if it told
	transient       bool   // goes with its last endpoint; every Attach brings the whole description
	driver          *Driver
	kicks           chan struct{} // asks keep for a round; one may wait
	ctx             context.Context
	end             context.CancelFunc // ends keep
	failed          atomic.Bool        // the segment stopped by itself

	mu         sync.Mutex // held for a whole operation on the network
	dead       bool       // deleted; whoever waited for the lock finds nothing
	segment    *endpoint.Segment
	added      []netip.Prefix // see endpoint.Segment.Added
	naming     *naming        // nil: names are not our business
	names      *names         // nil when it does not run
	containers map[string]*container
	cancel     context.CancelFunc // ends the segment's Run; nil when it does not run
	running    sync.WaitGroup     // the segment's Run
}

func (d *Driver) newNetwork(want usernet.Network) *network {
	n := &network{Network: want, driver: d, kicks: make(chan struct{}, 1), containers: map[string]*container{}}
	n.ctx, n.end = context.WithCancel(d.ctx)
	return n
}

// CreateNetwork makes a network. Asked again for the same one, it does nothing.
func (d *Driver) CreateNetwork(_ context.Context, want usernet.Network) error {
	n := d.newNetwork(want)
	old, err := d.create(n)
	if err != nil {
		return err
	}
	if old != nil {
		return d.sameNetwork(want)
	}
	n.mu.Unlock()
	return nil
}

// create makes a network and returns with its lock held. If there is one with its ID, it does nothing and returns it,
// unlocked.
func (d *Driver) create(n *network) (old *network, err error) {
	if err := d.check(n.Network); err != nil {
		return nil, err
	}
	routes, err := hostnet.Routed()
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	if old, err = d.insert(n, routes); err != nil || old != nil {
		n.mu.Unlock()
		n.end()
		return old, err
	}
	var steps undo.List
	defer func() {
		if err != nil {
			n.bury()
			err = errors.Join(err, steps.Close())
			n.mu.Unlock()
		}
	}()
	saved := n.saved()
	saved.Creating = true
	if err := d.store.putNetwork(saved); err != nil {
		return nil, err
	}
	steps.Push(func() error { return d.store.deleteNetwork(n) })
	steps.Push(n.takeDown)
	if err := n.open(); err != nil {
		return nil, fmt.Errorf("network %.12s: %w", n.ID, err)
	}
	if err := n.applyRules(); err != nil {
		return nil, fmt.Errorf("network %.12s: %w", n.ID, err)
	}
	if err := d.store.putNetwork(n.saved()); err != nil {
		return nil, err
	}
	d.keepers.Go(n.keep)
	return nil, nil
}

// insert puts n in the table, or returns the network that has its ID already. A subnet chosen for it avoids routed.
func (d *Driver) insert(n *network, routed []netip.Prefix) (old *network, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, ErrClosed
	}
	if old := d.networks[n.ID]; old != nil {
		return old, nil
	}
	if err := d.chooseSubnetsLocked(&n.Network, routed); err != nil {
		return nil, err
	}
	for _, other := range d.networks {
		if err := conflict(n.Network, other.Network); err != nil {
			return nil, err
		}
	}
	d.networks[n.ID] = n
	return nil, nil
}

// conflict tells why two networks cannot be on one host. Usermode networks have their fabric to themselves: any number
// of them may use the same addresses.
func conflict(a, b usernet.Network) error {
	if a.Options.Mode != usernet.Bridge || b.Options.Mode != usernet.Bridge {
		return nil
	}
	if a.BridgeName() == b.BridgeName() {
		return fmt.Errorf("%w: the bridge %s is in use by network %.12s", usernet.ErrExists, a.BridgeName(), b.ID)
	}
	for _, x := range a.Subnets {
		for _, y := range b.Subnets {
			if x.Prefix.Overlaps(y.Prefix) {
				return fmt.Errorf("%w: the subnet %s overlaps %s of network %.12s (if the engine does not know that network any more: usernet network rm %.12s)",
					usernet.ErrExists, x.Prefix, y.Prefix, b.ID, b.ID)
			}
		}
	}
	return nil
}

// chooseSubnetsLocked gives a network a subnet when neither the engine nor the user brought one.
func (d *Driver) chooseSubnetsLocked(n *usernet.Network, used []netip.Prefix) error {
	if len(n.Subnets) > 0 || n.Unaddressed {
		return nil
	}
	if n.Subnets = n.Options.Subnets; len(n.Subnets) > 0 {
		return config.Network(*n)
	}
	for _, other := range d.networks {
		for _, s := range other.Subnets {
			used = append(used, s.Prefix)
		}
	}
	s, err := ipam.Subnet4(used)
	if err != nil {
		return err
	}
	n.Subnets = []usernet.Subnet{s}
	return nil
}

// sameNetwork answers a repeated request: it waits for the first one and compares.
func (d *Driver) sameNetwork(want usernet.Network) error {
	n, err := d.lock(want.ID)
	if err != nil {
		return err
	}
	defer n.mu.Unlock()
	if !n.is(want) {
		return fmt.Errorf("network %.12s: %w with other settings", want.ID, usernet.ErrExists)
	}
	return nil
}

// foreign tells that the network and the containers' interfaces are somebody else's.
func (n *network) foreign() bool { return n.Options.Mode == usernet.Foreign }

// is tells whether the network is what is wanted.
func (n *network) is(want usernet.Network) bool {
	if len(want.Subnets) == 0 {
		want.Subnets = n.Subnets
	}
	return reflect.DeepEqual(n.Network, want)
}

// bury takes the network off the table; whoever waits for its lock finds it dead.
func (n *network) bury() {
	n.dead = true
	n.end()
	n.driver.mu.Lock()
	defer n.driver.mu.Unlock()
	delete(n.driver.networks, n.ID)
}

// DeleteNetwork takes a network away. It refuses while the network has endpoints whose containers are alive; records of
// dead ones go with it. A network that is not known is gone already.
func (d *Driver) DeleteNetwork(_ context.Context, id string) error {
	n, err := d.lock(id)
	if errors.Is(err, usernet.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	defer n.mu.Unlock()
	n.sweepLocked()
	for _, c := range n.containers {
		alive, err := n.alive(c)
		if err != nil {
			return err
		}
		if alive {
			return fmt.Errorf("%w: network %.12s has active endpoints: %.12s", usernet.ErrInvalid, id, c.ID)
		}
	}
	return n.removeLocked()
}

// removeLocked takes the network away with what is on it.
func (n *network) removeLocked() error {
	for _, c := range n.containers {
		if err := n.removeContainer(c); err != nil {
			return err
		}
	}
	if err := n.takeDown(); err != nil {
		return fmt.Errorf("network %.12s: %w", n.ID, err)
	}
	if err := n.driver.store.deleteNetwork(n); err != nil {
		return err
	}
	n.bury()
	return nil
}
