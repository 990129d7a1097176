package l2

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// ErrClaimed says that another port has been given the address.
var ErrClaimed = errors.New("address belongs to another port")

// table says behind which port an address is. An address stays with its port for as long as that one runs: there is no other
// way for a machine to move, and nobody can take it by sending from it. A port that uses many addresses pushes out its own.
type table struct {
	limit int           // addresses learned for each port
	taken atomic.Uint64 // how often a running port has lost an address to a claim

	mu      sync.RWMutex
	entries map[MAC]entry
}

type entry struct {
	port    *Port
	claimed bool
}

// addresses are what a port has in the table, which guards them.
type addresses struct {
	claimed []MAC
	learned []MAC // a ring once it is full
	oldest  int
}

func (t *table) lookup(mac MAC) *Port {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.entries[mac].port
}

// learn tells whether p may send from mac, and notes that it has.
func (t *table) learn(p *Port, mac MAC) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e, ok := t.entries[mac]; ok {
		return e.port == p
	}
	a := &p.addresses
	if len(a.learned) < t.limit {
		a.learned = append(a.learned, mac)
	} else {
		t.forgetLocked(p, a.learned[a.oldest])
		a.learned[a.oldest] = mac
		a.oldest = (a.oldest + 1) % t.limit
	}
	t.entries[mac] = entry{port: p}
	return true
}

// claim gives mac to p, from whoever has only been seen with it.
func (t *table) claim(p *Port, mac MAC) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e, ok := t.entries[mac]; ok && e.port != p {
		if e.claimed {
			return fmt.Errorf("%s: %w %d", mac, ErrClaimed, e.port.ID)
		}
		t.taken.Add(1) // e.port still has it among its learned ones; forgetLocked looks whose it is
	}
	t.entries[mac] = entry{port: p, claimed: true}
	p.addresses.claimed = append(p.addresses.claimed, mac)
	return nil
}

// forget removes all of p's addresses.
func (t *table) forget(p *Port) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, mac := range p.addresses.claimed {
		delete(t.entries, mac)
	}
	for _, mac := range p.addresses.learned {
		t.forgetLocked(p, mac)
	}
	p.addresses = addresses{}
}

func (t *table) forgetLocked(p *Port, mac MAC) {
	if e := t.entries[mac]; e.port == p && !e.claimed {
		delete(t.entries, mac)
	}
}

// dump returns the ports' IDs by address.
func (t *table) dump() map[MAC]int {
	t.mu.RLock()
	defer t.mu.RUnlock()
	ids := make(map[MAC]int, len(t.entries))
	for mac, e := range t.entries {
		ids[mac] = e.port.ID
	}
	return ids
}
