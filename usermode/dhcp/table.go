package dhcp

import (
	"net/netip"
	"time"
)

// state is what an address is to the machine in its record.
type state uint8

const (
	offered state = iota // it may ask for it, until then
	leased
	given    // it has had it, and gets it again if nobody else wants it
	declined // it has found somebody else with it: nobody gets it, until then
)

// record is what is known of an address.
type record struct {
	mac   MAC
	port  int
	state state
	until time.Time
	name  string
}

// held tells whether the address is somebody's at a time.
func (r *record) held(now time.Time) bool { return r.state != given && r.until.After(now) }

// maxRecords limits a table whose subnet is large.
const maxRecords = 4096

// table has the addresses of a subnet, those of them that anybody has or has had. How many one port causes is limited by
// whoever adds them.
type table struct {
	subnet  netip.Prefix
	taken   map[netip.Addr]bool // never given out by choice: reserved, or of a known machine
	records map[netip.Addr]*record
	byMAC   map[MAC]netip.Addr // of records that are not declined
	ports   map[int]int        // records of each port
	next    netip.Addr         // where to look for an address that nobody has had
}

func newTable(subnet netip.Prefix, taken map[netip.Addr]bool) table {
	return table{
		subnet: subnet, taken: taken, records: make(map[netip.Addr]*record),
		byMAC: make(map[MAC]netip.Addr), ports: make(map[int]int), next: subnet.Addr(),
	}
}

// set makes r the record of a; nil: there is none.
func (t *table) set(a netip.Addr, r *record) {
	if old := t.records[a]; old != nil {
		if t.ports[old.port]--; t.ports[old.port] == 0 {
			delete(t.ports, old.port)
		}
		if t.byMAC[old.mac] == a {
			delete(t.byMAC, old.mac)
		}
		delete(t.records, a)
	}
	if r == nil {
		return
	}
	if other, ok := t.byMAC[r.mac]; ok && r.state != declined {
		t.set(other, nil) // a machine has one address
	}
	t.records[a] = r
	t.ports[r.port]++
	if r.state != declined {
		t.byMAC[r.mac] = a
	}
}

// free tells whether mac may be given a, if it asks for it: it is the pool's and nobody else has it.
func (t *table) free(a netip.Addr, mac MAC, now time.Time) bool {
	if !t.subnet.Contains(a) || t.taken[a] {
		return false
	}
	r := t.records[a]
	return r == nil || r.mac == mac && r.state != declined || !r.held(now)
}

// choose returns an address for a machine that has none: one that nobody has had, as long as there are such, and then the one that
// has been nobody's for longest. When all are held it takes one that was declined, as only that may be a mistake.
func (t *table) choose(now time.Time) (netip.Addr, bool) {
	if a, ok := t.unused(); ok {
		return a, true
	}
	var best netip.Addr
	for _, desperate := range []bool{false, true} {
		for a, r := range t.records {
			if t.taken[a] || r.held(now) && !(desperate && r.state == declined) {
				continue
			}
			if !best.IsValid() || r.until.Before(t.records[best].until) || r.until.Equal(t.records[best].until) && a.Less(best) {
				best = a
			}
		}
		if best.IsValid() {
			return best, true
		}
	}
	return netip.Addr{}, false
}

// unused looks for an address without a record, from where the last one was found. Each step either finds one or passes one that is
// taken or has a record, so there are not many.
func (t *table) unused() (netip.Addr, bool) {
	if len(t.records) >= maxRecords {
		return netip.Addr{}, false
	}
	a := t.next
	for range len(t.taken) + len(t.records) + 1 {
		if !t.subnet.Contains(a) {
			a = t.subnet.Addr()
		}
		if !t.taken[a] && t.records[a] == nil {
			t.next = a
			return a, true
		}
		a = a.Next()
	}
	return netip.Addr{}, false
}

// admit tells whether a port that has limit records may cause another one. It may if one of its own can go: the one that has been
// nobody's, or only offered or declined, for longest.
func (t *table) admit(port, limit int, now time.Time) bool {
	if port == 0 || t.ports[port] < limit {
		return true
	}
	var oldest netip.Addr
	for a, r := range t.records {
		if r.port != port || r.state == leased && r.until.After(now) {
			continue
		}
		if !oldest.IsValid() || r.until.Before(t.records[oldest].until) {
			oldest = a
		}
	}
	if !oldest.IsValid() {
		return false
	}
	t.set(oldest, nil)
	return true
}
