package driver

import (
	"context"
	"errors"
	"time"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/endpoint"
)

// segmentConfig is what the network's segment is made from.
func (n *network) segmentConfig() endpoint.Config {
	return endpoint.Config{
		Network: n.Network,
		Dir:     n.driver.namespaceDir(),
		Added:   n.added,
		Blocked: n.driver.blocked,
		Host:    n.driver.hostAlias(),
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
	n.startNames()
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
				n.retryNames()
				n.expireLocked()
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
	n.stopNames()
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

// expireLocked removes a transient network that nobody is on.
func (n *network) expireLocked() {
	if !n.transient || len(n.containers) > 0 {
		return
	}
	if err := n.removeLocked(); err != nil {
		n.driver.cfg.Log.Warn("unused network is left", "network", shortID(n.ID), "error", err)
	}
}

// discard removes a network whose creation was cut off: its record tells what may be there.
func (n *network) discard() error {
	if err := endpoint.Remove(n.segmentConfig()); err != nil {
		return err
	}
	return n.driver.store.deleteNetwork(n)
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
	n.kick() // if it is transient, it may have gone unused
	return nil
}

func (n *network) endpoints() []usernet.Endpoint {
	var eps []usernet.Endpoint
	for _, c := range n.containers {
		eps = append(eps, c.Endpoint)
	}
	return eps
}
