package driver

import (
	"net/netip"
	"sync"

	"github.com/usernet/usernet"
)

// claims tells which endpoint of a container publishes a port of it. An engine may want all ports of a container on
// each of its networks, and the host port is there only once.
type claims struct {
	freed func() // called when a port is released that another endpoint of the container waits for

	mu    sync.Mutex
	taken map[claim]*claimant
}

type claimant struct {
	endpoint string // its ID
	wanted   bool   // another endpoint was refused
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
	if by := cs.taken[k]; by != nil && by.endpoint != c.ID {
		by.wanted = true
		return nil, false
	}
	if cs.taken == nil {
		cs.taken = map[claim]*claimant{}
	}
	cs.taken[k] = &claimant{endpoint: c.ID}
	return func() { cs.release(k) }, true
}

func (cs *claims) release(k claim) {
	cs.mu.Lock()
	by := cs.taken[k]
	delete(cs.taken, k)
	cs.mu.Unlock()
	if by != nil && by.wanted {
		cs.freed()
	}
}
