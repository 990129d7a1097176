package driver

import (
	"time"

	"github.com/usernet/usernet/endpoint"
)

// unjoinedFor is how long an endpoint may wait for its container. Docker calls Join right after CreateEndpoint; when it
// dies in between, it forgets the endpoint.
const unjoinedFor = 2 * time.Minute

// sweepLocked removes the endpoints whose containers have vanished without a word: the engine was killed, or we were
// away when it called. Docker swallows every error of a teardown, so nothing else ever would.
func (n *network) sweepLocked() {
	for _, c := range n.containers {
		stale, why := n.stale(c)
		if !stale {
			continue
		}
		n.driver.cfg.Log.Info("removing an endpoint whose container is gone", "network", shortID(n.ID), "endpoint", shortID(c.ID), "why", why)
		if err := n.removeContainer(c); err != nil {
			n.driver.cfg.Log.Warn("stale endpoint is left", "endpoint", c.ID, "error", err)
		}
	}
}

func (n *network) stale(c *container) (bool, string) {
	if n.segment == nil {
		return false, ""
	}
	state, err := n.segment.Link(c.Endpoint).State()
	if err != nil {
		n.driver.cfg.Log.Warn("endpoint is not checked", "endpoint", c.ID, "error", err)
		return false, ""
	}
	switch {
	case state == endpoint.Gone:
		return true, "its link went with its namespace"
	case !c.joined:
		return time.Since(c.since) > unjoinedFor, "no container joined it"
	case state == endpoint.Home && c.sandboxGone():
		// Docker ≤ 27 calls Join before it makes the namespace: only what lasts from one round to the next counts.
		was := c.homeless
		c.homeless = true
		return was && time.Since(c.since) > n.driver.cfg.CheckEvery, "its container's namespace is gone"
	}
	c.homeless = false
	return false, ""
}
