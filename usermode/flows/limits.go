package flows

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// quota counts what is held on behalf of clients, with a limit for all of them and a lower one for each.
type quota struct {
	total, each int // the limits

	mu   sync.Mutex
	used int
	by   map[netip.Addr]int
}

func newQuota(total, each int) *quota {
	return &quota{total: total, each: each, by: make(map[netip.Addr]int)}
}

// take takes one for client, unless there is none left.
func (q *quota) take(client netip.Addr) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.used >= q.total || q.by[client] >= q.each {
		return false
	}
	q.used++
	q.by[client]++
	return true
}

// put gives one of client's back.
func (q *quota) put(client netip.Addr) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.used--
	if q.by[client]--; q.by[client] == 0 {
		delete(q.by, client)
	}
}

func (q *quota) count() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.used
}

// How many ICMP errors a guest may get: so many at once, and so many in a second. Programs that trace routes ask for
// dozens at once.
const (
	errorBurst = 100
	errorRate  = 100
	maxBuckets = 1024
)

// errorLimit bounds the ICMP errors for each guest, as RFC 1812 and RFC 4443 ask routers to.
type errorLimit struct {
	mu      sync.Mutex
	buckets map[netip.Addr]bucket

	sent, held atomic.Uint64
}

type bucket struct {
	left float64
	at   time.Duration
}

func newErrorLimit() *errorLimit { return &errorLimit{buckets: make(map[netip.Addr]bucket)} }

// take tells whether client may get another, and counts.
func (l *errorLimit) take(client netip.Addr, now time.Duration) (ok bool) {
	l.mu.Lock()
	b, known := l.buckets[client]
	if !known {
		if len(l.buckets) >= maxBuckets {
			clear(l.buckets) // forgetting is harmless: everybody gets another burst
		}
		b = bucket{left: errorBurst, at: now}
	}
	b.left = min(errorBurst, b.left+max(0, now-b.at).Seconds()*errorRate)
	b.at = now
	if ok = b.left >= 1; ok {
		b.left--
	}
	l.buckets[client] = b
	l.mu.Unlock()
	if ok {
		l.sent.Add(1)
	} else {
		l.held.Add(1)
	}
	return ok
}
