package tcprelay

import (
	"net/netip"
	"sync"
)

// Quota counts what is held on behalf of clients, with a limit for all of them and a lower one for each, so that one
// of them cannot take everything. It must not be copied.
type Quota struct {
	total, each int // the limits

	mu      sync.Mutex
	used    int
	by      map[netip.Addr]int
	refused uint64 // times that Take took nothing
}

// NewQuota makes a quota of which nothing is taken.
func NewQuota(total, each int) *Quota {
	return &Quota{total: total, each: each, by: make(map[netip.Addr]int)}
}

// Take takes one for client, unless there is none left.
func (q *Quota) Take(client netip.Addr) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.used >= q.total || q.by[client] >= q.each {
		q.refused++
		return false
	}
	q.used++
	q.by[client]++
	return true
}

// Put gives one of client's back.
func (q *Quota) Put(client netip.Addr) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.used--
	if q.by[client]--; q.by[client] == 0 {
		delete(q.by, client)
	}
}

// Counts tells how many are taken, and how often there was none left.
func (q *Quota) Counts() (used int, refused uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.used, q.refused
}
