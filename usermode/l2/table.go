package l2

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// ErrClaimed says that another port has been given the address.
var ErrClaimed = errors.New("address belongs to another port")

const (
	// quietAfter is how long a holder that has spoken since another port began must have been silent before that one may take its
	// address; maxQuiet is what that grows to while the holder turns out to be alive.
	quietAfter = time.Second
	maxQuiet   = time.Minute
	// maxOlder is how many earlier holders of an address are kept in mind.
	maxOlder = 3
)

// table says behind which port an address is, by the rule in the package's comment. A port that uses many addresses pushes
// out its own.
type table struct {
	limit int           // addresses learned for each port
	quiet time.Duration // quietAfter
	now   func() time.Duration
	moves atomic.Uint64 // how often a running port has lost an address

	mu      sync.RWMutex
	entries map[MAC]*entry
}

// entry is where an address is. It is never changed, but replaced.
type entry struct {
	port    *Port
	claimed bool
	older   []*Port       // ports that had the address before, still run, and have not spoken from it since; the first one first
	wary    time.Duration // how long the holder must have been silent; 0: nobody has taken the address from one that was alive
}

// addresses are what a port has in the table, which guards them.
type addresses struct {
	claimed []MAC
	learned []MAC // a ring once it is full
	oldest  int
}

func (t *table) lookup(mac MAC) *entry {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.entries[mac]
}

func (t *table) portOf(mac MAC) *Port {
	if e := t.lookup(mac); e != nil {
		return e.port
	}
	return nil
}

// learn tells whether p may send from mac, and notes that it has.
func (t *table) learn(p *Port, mac MAC) bool {
	loser, ok := t.give(p, mac)
	if loser != nil {
		loser.queue.wakeWaiting()
	}
	return ok
}

// give is learn; loser is the port that had the address until now.
func (t *table) give(p *Port, mac MAC) (loser *Port, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := &entry{port: p}
	if e := t.entries[mac]; e != nil {
		if e.port == p {
			return nil, true
		}
		if next = t.movedLocked(e, p); next == nil {
			return nil, false
		}
		loser = e.port
		t.moves.Add(1)
	}
	t.noteLocked(p, mac)
	t.entries[mac] = next
	return loser, true
}

// movedLocked is e as it is when p has sent from its address; nil: p may not.
func (t *table) movedLocked(e *entry, p *Port) *entry {
	if e.claimed {
		return nil
	}
	if i := slices.Index(e.older, p); i >= 0 {
		return &entry{port: p, older: e.older[:i:i], wary: min(max(t.quiet, 2*e.wary), maxQuiet)}
	}
	if p.began <= e.port.began || len(e.older) == maxOlder {
		return nil
	}
	heard := time.Duration(e.port.heard.Load())
	if t.now()-heard < max(t.quiet, e.wary) && (e.wary > 0 || heard >= p.began) {
		return nil
	}
	return &entry{port: p, older: append(slices.Clip(e.older), e.port), wary: e.wary}
}

// noteLocked puts mac among what p has learned, unless it is there.
func (t *table) noteLocked(p *Port, mac MAC) {
	a := &p.addresses
	if slices.Contains(a.learned, mac) {
		return
	}
	if len(a.learned) < t.limit {
		a.learned = append(a.learned, mac)
		return
	}
	t.forgetLocked(p, a.learned[a.oldest])
	a.learned[a.oldest] = mac
	a.oldest = (a.oldest + 1) % t.limit
}

// claim gives mac to p, from whoever has only been seen with it.
func (t *table) claim(p *Port, mac MAC) error {
	t.mu.Lock()
	e := t.entries[mac]
	if e != nil && e.port != p && e.claimed {
		t.mu.Unlock()
		return fmt.Errorf("%s: %w %d", mac, ErrClaimed, e.port.ID)
	}
	t.entries[mac] = &entry{port: p, claimed: true}
	p.addresses.claimed = append(p.addresses.claimed, mac)
	t.moves.Add(1)
	t.mu.Unlock()
	if e != nil {
		e.port.queue.wakeWaiting()
	}
	return nil
}

// forget removes all of p's addresses.
func (t *table) forget(p *Port) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, mac := range p.addresses.claimed {
		if e := t.entries[mac]; e != nil && e.port == p {
			delete(t.entries, mac)
		}
	}
	for _, mac := range p.addresses.learned {
		t.forgetLocked(p, mac)
	}
	p.addresses = addresses{}
}

// forgetLocked removes what p has to do with mac. An earlier holder that still runs has it again.
func (t *table) forgetLocked(p *Port, mac MAC) {
	e := t.entries[mac]
	if e == nil || e.claimed {
		return
	}
	next := *e
	last := len(e.older) - 1
	switch i := slices.Index(e.older, p); {
	case i >= 0:
		next.older = slices.Concat(e.older[:i], e.older[i+1:])
	case e.port != p:
		return
	case last < 0:
		delete(t.entries, mac)
		return
	default:
		next.port, next.older = e.older[last], e.older[:last]
	}
	if len(next.older) == 0 {
		next.wary = 0
	}
	t.entries[mac] = &next
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
