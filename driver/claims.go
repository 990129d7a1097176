package driver

import (
	"net/netip"
	"sync"

	"github.com/usernet/usernet"
)

// claims tells which endpoint of a container publishes a port of it. An engine may want all ports of a container on
// each of its networks, and the host port is there only once.
type claims struct {
	mu    sync.Mutex
	taken map[claim]string // endpoints' IDs
}

type claim struct {
	container string
	proto     usernet.Proto
	hostIP    netip.Addr
	hostPort  uint16
}

// take claims a port for an endpoint until release, unless another endpoint of its container has it.
func (cs *claims) take(c *container, p usernet.Port) (release func(), ok bool) {
	if c.owner.ID == "" || p.HostPort == 0 {
		return func() {}, true
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	k := claim{c.owner.ID, p.Proto, p.HostIP, p.HostPort}
	if by, taken := cs.taken[k]; taken && by != c.ID {
		return nil, false
	}
	if cs.taken == nil {
		cs.taken = map[claim]string{}
	}
	cs.taken[k] = c.ID
	return func() {
		cs.mu.Lock()
		defer cs.mu.Unlock()
		delete(cs.taken, k)
	}, true
}
