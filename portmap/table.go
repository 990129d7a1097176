package portmap

import (
	"net/netip"
	"slices"
	"sync"

	"github.com/usernet/usernet"
)

// slot is a port number of one protocol; every host address has one of its own.
type slot struct {
	proto usernet.Proto
	port  uint16
}

// holding says who has a slot at one host address, which may be the wildcard of its family.
type holding struct {
	addr  netip.Addr
	owner string
}

// table is who holds which port. It knows nothing of other processes.
type table struct {
	mu   sync.Mutex
	held map[slot][]holding
}

// reserve gives owner the slot at all of addrs, or at none: then it returns the first address that is taken and who
// has it.
func (t *table) reserve(s slot, addrs []netip.Addr, owner string) (at netip.Addr, holder string, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, a := range addrs {
		for _, h := range t.held[s] {
			if overlap(a, h.addr) {
				return a, h.owner, false
			}
		}
	}
	for _, a := range addrs {
		t.held[s] = append(t.held[s], holding{a, owner})
	}
	return netip.Addr{}, "", true
}

// release takes back what reserve gave.
func (t *table) release(s slot, addrs []netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	rest := slices.DeleteFunc(t.held[s], func(h holding) bool { return slices.Contains(addrs, h.addr) })
	if len(rest) == 0 {
		delete(t.held, s)
		return
	}
	t.held[s] = rest
}

// overlap reports whether a packet could be for both addresses.
func overlap(a, b netip.Addr) bool {
	return a == b || a.Is4() == b.Is4() && (a.IsUnspecified() || b.IsUnspecified())
}
