package icmperror

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// How many errors a guest may get: so many at once, and so many in a second. Programs that trace routes ask for dozens at
// once.
const (
	burst      = 100
	rate       = 100
	maxBuckets = 1024
)

// Limit bounds the errors for each guest, as RFC 1812 and RFC 4443 ask routers to. The zero value has sent none yet. It is
// safe for concurrent use.
type Limit struct {
	Sent, Held atomic.Uint64 // errors that Take has allowed, and those that were one too many

	mu      sync.Mutex
	buckets map[netip.Addr]bucket
}

type bucket struct {
	left float64
	at   time.Time
}

// Take tells whether client may get another, and counts.
func (l *Limit) Take(client netip.Addr, now time.Time) bool {
	if !l.take(client, now) {
		l.Held.Add(1)
		return false
	}
	l.Sent.Add(1)
	return true
}

func (l *Limit) take(client netip.Addr, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	b, ok := l.buckets[client]
	if !ok {
		if l.buckets == nil || len(l.buckets) >= maxBuckets {
			l.buckets = make(map[netip.Addr]bucket) // forgetting is harmless: everybody gets another burst
		}
		b = bucket{left: burst, at: now}
	}
	// Of two goroutines, the one that has looked at the clock first may come second.
	b.left = min(burst, b.left+max(0, now.Sub(b.at)).Seconds()*rate)
	b.at = now
	ok = b.left >= 1
	if ok {
		b.left--
	}
	l.buckets[client] = b
	return ok
}
