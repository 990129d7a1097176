package dns

import (
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
)

// Zone is a zone as gvproxy has them: fixed records, patterns, and an address for all the rest.
type Zone struct {
	Name      string // containers.internal; a final dot makes no difference
	Records   []ZoneRecord
	DefaultIP netip.Addr // what every other name in the zone stands for; zero: they do not exist
}

// ZoneRecord is the address of one name of a zone, or of all names that match a pattern.
type ZoneRecord struct {
	Name   string         // relative to the zone: gateway; "" if there is only the pattern
	Regexp *regexp.Regexp // matched with the name relative to the zone, in lower case; nil: none
	IP     netip.Addr
}

// Zones is a list of zones and a Source. A name belongs to the first zone of the list that it is in. As with gvproxy,
// the zone's own name is not in it.
type Zones struct {
	mu    sync.RWMutex
	zones []zone
}

type zone struct {
	Zone
	suffix string // what the names in it end with; canonical, with the dot before it
}

// Add adds a zone. If there is one of that name, the new records come before its own and the default address is
// replaced.
func (z *Zones) Add(add Zone) {
	suffix := "."
	if name, ok := canonical(add.Name); ok && name != "." {
		suffix += name
	}
	add.Records = slices.Clone(add.Records)
	z.mu.Lock()
	defer z.mu.Unlock()
	i := slices.IndexFunc(z.zones, func(have zone) bool { return have.suffix == suffix })
	if i < 0 {
		z.zones = append(z.zones, zone{add, suffix})
		return
	}
	have := &z.zones[i]
	have.Records = append(add.Records, have.Records...)
	have.DefaultIP = add.DefaultIP
}

// All returns the zones as they were added. The caller may change the list, not the records.
func (z *Zones) All() []Zone {
	z.mu.RLock()
	defer z.mu.RUnlock()
	all := make([]Zone, len(z.zones))
	for i, have := range z.zones {
		all[i] = have.Zone
	}
	return all
}

// Lookup implements Source.
func (z *Zones) Lookup(name string) (Answer, bool) {
	z.mu.RLock()
	defer z.mu.RUnlock()
	for _, have := range z.zones {
		if short, ok := strings.CutSuffix(name, have.suffix); ok && short != "" {
			return have.lookup(short), true
		}
	}
	return Answer{}, false
}

func (z *zone) lookup(short string) Answer {
	a := Answer{Zone: z.suffix[1:]}
	if a.Zone == "" {
		a.Zone = "."
	}
	above := false // a name without a record exists if there is one below it
	for _, r := range z.Records {
		if r.matches(short) {
			a.Addrs = withFirst(a.Addrs, r.IP)
		} else if n := len(r.Name) - len(short) - 1; n > 0 && strings.EqualFold(r.Name[n:], "."+short) {
			above = true
		}
	}
	if len(a.Addrs) == 0 {
		a.Addrs = withFirst(nil, z.DefaultIP)
	}
	a.Missing = len(a.Addrs) == 0 && !above
	return a
}

func (r *ZoneRecord) matches(short string) bool {
	return r.Name != "" && strings.EqualFold(r.Name, short) || r.Regexp != nil && r.Regexp.MatchString(short)
}

// withFirst adds an address if there is none of its family yet: an earlier record hides a later one.
func withFirst(addrs []netip.Addr, a netip.Addr) []netip.Addr {
	a = a.Unmap()
	if !a.IsValid() || slices.ContainsFunc(addrs, func(b netip.Addr) bool { return b.Is4() == a.Is4() }) {
		return addrs
	}
	return append(addrs, a)
}
