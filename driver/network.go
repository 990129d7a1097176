package driver

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/config"
	"github.com/usernet/usernet/endpoint"
	"github.com/usernet/usernet/internal/dump"
	"github.com/usernet/usernet/internal/undo"
	"github.com/usernet/usernet/ipam"
)

// network is one row of the table.
type network struct {
	usernet.Network // never changes once the network is in the table
	driver          *Driver
	kicks           chan struct{} // asks keep for a round; one may wait
	ctx             context.Context
	end             context.CancelFunc // ends keep
	failed          atomic.Bool        // the segment stopped by itself

	mu         sync.Mutex // held for a whole operation on the network
	dead       bool       // deleted; whoever waited for the lock finds nothing
	segment    *endpoint.Segment
	added      []netip.Prefix // see endpoint.Segment.Added
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
func (d *Driver) CreateNetwork(_ context.Context, want usernet.Network) (err error) {
	if err := config.Network(want); err != nil {
		return err
	}
	routes, err := routedPrefixes()
	if err != nil {
		return err
	}
	n := d.newNetwork(want)
	n.mu.Lock()
	defer n.mu.Unlock()
	old, err := d.insert(n, routes)
	if err != nil {
		return err
	}
	if old != nil {
		return d.sameNetwork(want)
	}
	var steps undo.List
	defer func() {
		if err != nil {
			n.bury()
			err = errors.Join(err, steps.Close())
		}
	}()
	saved := saveNetwork(n.Network, nil)
	saved.Creating = true
	if err := d.store.putNetwork(saved); err != nil {
		return err
	}
	steps.Push(func() error { return d.store.deleteNetwork(n.ID) })
	steps.Push(n.takeDown)
	if err := n.open(); err != nil {
		return fmt.Errorf("network %.12s: %w", n.ID, err)
	}
	if err := n.applyRules(); err != nil {
		return fmt.Errorf("network %.12s: %w", n.ID, err)
	}
	if err := d.store.putNetwork(saveNetwork(n.Network, n.added)); err != nil {
		return err
	}
	d.keepers.Go(n.keep)
	return nil
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
	if len(n.Subnets) > 0 {
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

// routedPrefixes are the IPv4 destinations that the host has a route for, without the default route.
func routedPrefixes() ([]netip.Prefix, error) {
	routes, err := dump.Whole(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var ps []netip.Prefix
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		a, ok := netip.AddrFromSlice(r.Dst.IP.To4())
		if bits, _ := r.Dst.Mask.Size(); ok && bits > 0 {
			ps = append(ps, netip.PrefixFrom(a, bits))
		}
	}
	return ps, nil
}

// sameNetwork answers a repeated request: it waits for the first one and compares.
func (d *Driver) sameNetwork(want usernet.Network) error {
	n, err := d.lock(want.ID)
	if err != nil {
		return err
	}
	defer n.mu.Unlock()
	if len(want.Subnets) == 0 {
		want.Subnets = n.Subnets
	}
	if !reflect.DeepEqual(n.Network, want) {
		return fmt.Errorf("network %.12s: %w with other settings", want.ID, usernet.ErrExists)
	}
	return nil
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
	for _, c := range n.containers {
		if err := n.removeContainer(c); err != nil {
			return err
		}
	}
	if err := n.takeDown(); err != nil {
		return fmt.Errorf("network %.12s: %w", id, err)
	}
	if err := d.store.deleteNetwork(id); err != nil {
		return err
	}
	n.bury()
	return nil
}

// segmentConfig is what the network's segment is made from.
func (n *network) segmentConfig() endpoint.Config {
	return endpoint.Config{
		Network: n.Network,
		Dir:     n.driver.namespaceDir(),
		Added:   n.added,
		Blocked: n.driver.blocked,
		Log:     n.driver.cfg.Log.With("network", shortID(n.ID)),
	}
}

// open makes the network live, but for its firewall rules.
func (n *network) open() error {
	if n.Options.Mode == usernet.Bridge && !n.Internal {
		if err := n.driver.rules.enableForwarding(n.Network); err != nil {
			return err
		}
	}
	seg, err := endpoint.Open(n.segmentConfig())
	if err != nil {
		return err
	}
	n.segment, n.added = seg, seg.Added()
	n.start()
	return nil
}

// start carries the network's traffic until release.
func (n *network) start() {
	ctx, cancel := context.WithCancel(n.ctx)
	n.cancel = cancel
	n.failed.Store(false)
	seg := n.segment
	n.running.Go(func() {
		if err := seg.Run(ctx, n.kick); err != nil {
			n.driver.cfg.Log.Error("network has stopped", "network", n.ID, "error", err)
			waitFor(ctx, time.Second) // what fails at once must not be tried at once, over and over
			n.failed.Store(true)
			n.kick()
		}
	})
}

// keep looks after the network whenever it is kicked, until the network or the driver ends.
func (n *network) keep() {
	for {
		select {
		case <-n.kicks:
			n.mu.Lock()
			if n.ctx.Err() == nil {
				n.revive()
				n.sweepLocked()
				n.retryPorts()
			}
			n.mu.Unlock()
		case <-n.ctx.Done():
			return
		}
	}
}

// revive opens a network again that stopped by itself or could not be opened before.
func (n *network) revive() {
	if n.segment != nil && !n.failed.Load() {
		return
	}
	err := n.release()
	if err == nil {
		err = n.open()
	}
	if err == nil {
		err = n.applyRules()
	}
	if err != nil {
		n.driver.cfg.Log.Error("network is still down", "network", n.ID, "error", err)
		return
	}
	n.driver.cfg.Log.Info("network is up again", "network", n.ID)
}

func waitFor(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// kick asks for a sweep soon. It never blocks.
func (n *network) kick() {
	select {
	case n.kicks <- struct{}{}:
	default:
	}
}

// release ends the traffic and closes what is open, and leaves the kernel as it is.
func (n *network) release() error {
	var errs []error
	for _, c := range n.containers {
		errs = append(errs, c.closeForwards())
	}
	if n.cancel != nil {
		n.cancel()
		n.running.Wait() // not for keep, which may be waiting for the lock that the caller holds
		n.cancel = nil
	}
	if n.segment != nil {
		errs = append(errs, n.segment.Close())
		n.segment = nil
	}
	return errors.Join(errs...)
}

// takeDown takes the network out of the kernel. It may be repeated.
func (n *network) takeDown() error {
	if err := n.driver.rules.remove(n.ID); err != nil {
		return err
	}
	if err := n.release(); err != nil {
		return err
	}
	return endpoint.Remove(n.segmentConfig())
}

// discard removes a network whose creation was cut off: its record tells what may be there.
func (n *network) discard() error {
	if err := endpoint.Remove(n.segmentConfig()); err != nil {
		return err
	}
	return n.driver.store.deleteNetwork(n.ID)
}

// restore brings back a network of the store with its endpoints.
func (n *network) restore() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	saved, err := n.driver.store.loadEndpoints(n.ID)
	if err != nil {
		return err
	}
	var half []*container
	for _, s := range saved {
		c, err := s.container()
		if err != nil {
			return err
		}
		if s.Creating {
			half = append(half, c)
			continue
		}
		n.containers[c.ID] = c
	}
	n.driver.keepers.Go(n.keep)
	if err := n.open(); err != nil {
		return err
	}
	if err := n.applyRules(); err != nil {
		return err
	}
	for _, c := range half {
		if err := n.removeContainer(c); err != nil {
			n.driver.cfg.Log.Warn("half-made endpoint is left", "endpoint", c.ID, "error", err)
		}
	}
	if err := n.segment.Prune(n.endpoints()); err != nil {
		n.driver.cfg.Log.Warn("links of forgotten endpoints are left", "network", n.ID, "error", err)
	}
	n.sweepLocked()
	n.retryPorts()
	return nil
}

func (n *network) endpoints() []usernet.Endpoint {
	var eps []usernet.Endpoint
	for _, c := range n.containers {
		eps = append(eps, c.Endpoint)
	}
	return eps
}
