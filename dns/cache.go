package dns

import (
	"container/list"
	"encoding/binary"
	"sync"
	"time"

	miekg "github.com/miekg/dns"
)

// What the cache of one network may hold, and for how long at most.
const (
	cacheEntries = 4096
	cacheBytes   = 4 << 20
	cachePlain   = time.Hour
	cacheMissing = 5 * time.Minute
)

// entryCost is about what an entry takes besides its message and its key, in bytes.
const entryCost = 256

// cache keeps answers of upstream as they came, for as long as their records live. The answer used longest ago makes
// room for the next.
type cache struct {
	mu      sync.Mutex
	entries map[string]*list.Element // of *cached
	recent  list.List                // the latest used first
	bytes   int
}

type cached struct {
	key     string
	msg     []byte
	ttls    []uint16 // where the TTLs lie
	stored  time.Time
	expires time.Time
}

func (e *cached) cost() int { return entryCost + len(e.key) + len(e.msg) + 2*len(e.ttls) }

func newCache() *cache { return &cache{entries: make(map[string]*list.Element)} }

// get appends the answer that is kept under key to dst, with the time that its records have left.
func (c *cache) get(dst, key []byte) ([]byte, bool) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	el, ok := c.entries[string(key)]
	if !ok {
		return dst, false
	}
	e := el.Value.(*cached)
	if !now.Before(e.expires) {
		c.removeLocked(el)
		return dst, false
	}
	c.recent.MoveToFront(el)
	start := len(dst)
	dst = append(dst, e.msg...)
	age := uint32(now.Sub(e.stored) / time.Second)
	for _, off := range e.ttls {
		ttl := dst[start+int(off):]
		// What is kept expires with its shortest TTL, so none of them is younger than age.
		binary.BigEndian.PutUint32(ttl, binary.BigEndian.Uint32(ttl)-age)
	}
	return dst, true
}

// put keeps an answer, if its records allow that. It takes msg over.
func (c *cache) put(key string, msg []byte) {
	ttl, ttls := lifetime(msg)
	if ttl <= 0 {
		return
	}
	now := time.Now()
	e := &cached{key: key, msg: msg, ttls: ttls, stored: now, expires: now.Add(ttl)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if el, ok := c.entries[key]; ok {
		c.removeLocked(el)
	}
	c.entries[key] = c.recent.PushFront(e)
	c.bytes += e.cost()
	for c.bytes > cacheBytes || len(c.entries) > cacheEntries {
		c.removeLocked(c.recent.Back())
	}
}

func (c *cache) removeLocked(el *list.Element) {
	e := c.recent.Remove(el).(*cached)
	delete(c.entries, e.key)
	c.bytes -= e.cost()
}

// lifetime tells how long an answer may be kept, 0 for not at all, and where its TTLs lie. Negative answers live as
// RFC 2308 section 5 says: as long as the SOA in them, and not at all without one.
func lifetime(msg []byte) (time.Duration, []uint16) {
	rcode := rcodeOf(msg)
	end, err := questionEnd(msg)
	if err != nil || flags(msg)&flagTC != 0 || rcode != miekg.RcodeSuccess && rcode != miekg.RcodeNameError {
		return 0, nil
	}
	asked := u16(msg, end-4)
	least, longest := uint32(1<<31-1), cachePlain
	var ttls []uint16
	answered, soa := false, false
	_, err = walk(msg, end, func(r record) {
		if r.rtype(msg) == miekg.TypeOPT {
			if msg[r.fixed+4] != 0 { // the upper bits of the code, as in BADVERS
				least = 0
			}
			return
		}
		ttl := r.ttl(msg)
		if ttl >= 1<<31 { // RFC 2181 section 8
			ttl = 0
		}
		least = min(least, ttl)
		ttls = append(ttls, uint16(r.fixed+4))
		switch {
		case r.section == inAnswer:
			answered = answered || r.rtype(msg) == asked || asked == miekg.TypeANY
		case r.section == inAuthority && r.rtype(msg) == miekg.TypeSOA && len(r.data(msg)) >= 4:
			soa = true
			least = min(least, u32(msg, r.end-4)) // the last field of SOA is its minimum
		}
	})
	if err != nil {
		return 0, nil
	}
	if !answered || rcode == miekg.RcodeNameError {
		if longest = cacheMissing; !soa {
			return 0, nil
		}
	}
	return min(time.Duration(least)*time.Second, longest), ttls
}
