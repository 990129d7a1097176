package driver

import (
	"time"

	"github.com/usernet/usernet/endpoint"
)

// waitsFor is how long an endpoint may wait for its container, before Join and after it. Docker calls Join right after
// CreateEndpoint and takes the link when the container's namespace stands; when it dies in between, it forgets the
// endpoint.
const waitsFor = 2 * time.Minute

// sweepLocked removes the endpoints whose containers have vanished without a word: the engine was killed, or we were
// away when it called. Docker swallows every error of a teardown, so nothing else ever would.
func (n *network) sweepLocked() {
	if n.segment == nil || len(n.containers) == 0 {
		return
	}
	if g := n.segment.Gateway(); g != nil {
		if err := g.Repair(); err != nil {
			n.driver.cfg.Log.Warn("the network's namespace is not checked", "network", shortID(n.ID), "error", err)
		}
	}
	if n.foreign() {
		n.sweepForeign()
		return
	}
	states, err := n.segment.States(n.endpoints())
	if err != nil {
		n.driver.cfg.Log.Warn("endpoints are not checked", "network", shortID(n.ID), "error", err)
		return
	}
	for _, c := range n.containers {
		n.observe(c, states[c.ID])
		if why := c.stale(states[c.ID]); why != "" {
			n.removeStale(c, why)
		}
	}
}

// sweepForeign is sweepLocked where we have no links to look at.
func (n *network) sweepForeign() {
	for _, c := range n.containers {
		if c.sandboxGone() {
			n.removeStale(c, "its namespace is gone")
		}
	}
}

func (n *network) removeStale(c *container, why string) {
	n.driver.cfg.Log.Info("removing an endpoint whose container is gone", "network", shortID(n.ID), "endpoint", shortID(c.ID), "why", why)
	if err := n.removeContainer(c); err != nil {
		n.driver.cfg.Log.Warn("stale endpoint is left", "endpoint", c.ID, "error", err)
	}
}

// observe writes down that a container has the endpoint's link.
func (n *network) observe(c *container, state endpoint.State) {
	if state != endpoint.Moved || !c.joined || c.moved {
		return
	}
	c.moved = true
	if err := n.save(c); err != nil {
		n.driver.cfg.Log.Warn("endpoint is not saved", "endpoint", c.ID, "error", err)
	}
}

// stale tells why an endpoint has no container any more and will not get one; "" says that it has or may.
func (c *container) stale(state endpoint.State) string {
	switch {
	case state == endpoint.Gone:
		return "its link went with its namespace"
	case state == endpoint.Moved:
		return ""
	case !c.joined && time.Since(c.since) > waitsFor:
		return "no container joined it"
	case c.joined && c.sandboxGone() && c.moved:
		return "its link was handed back"
	case c.joined && c.sandboxGone() && time.Since(c.since) > waitsFor:
		// The namespace need not exist yet at Join, up to Docker 27.
		return "its container never came to be"
	}
	return ""
}
