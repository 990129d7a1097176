package flows

import (
	"net/netip"
	"sync"
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
