package dns

import (
	"net/netip"
	"slices"
	"strings"
	"sync"

	miekg "github.com/miekg/dns"
)

// Network is what names a network has whatever its containers are.
type Network struct {
	// Domains are the network's search domains, such as dns.podman. A container has its names in each of them, and they
	// are this network's alone: what is not known in them does not exist.
	Domains []string
	// Subnets are the ranges whose reverse names are the network's alone.
	Subnets []netip.Prefix
	// Host is what host.containers.internal and host.docker.internal stand for; none: they are not answered here.
	Host []netip.Addr
	// Gateway is likewise for gateway.containers.internal and gateway.docker.internal.
	Gateway []netip.Addr
}

// Entry is an endpoint as its neighbours may find it.
type Entry struct {
	// Names are the container's name, host name and aliases. The first is what its addresses are called in reverse.
	// What cannot be a name in DNS (a label of more than 63 bytes) is left out.
	Names []string
	Addrs []netip.Addr
}

// Records is the table of the names on one network: a Source that changes as containers come and go.
type Records struct {
	domains  []string // canonical
	subnets  []netip.Prefix
	reserved []string // the special names, which no endpoint can have

	mu      sync.RWMutex
	entries map[string]Entry // by endpoint; the names canonical
	names   map[string]*bucket[netip.Addr]
	addrs   map[netip.Addr]*bucket[string]
}

// The IDs of the entries that a network has by itself; no engine calls an endpoint this way.
const (
	hostID    = "\x00host"
	gatewayID = "\x00gateway"
)

// NewRecords makes the table of a network without containers.
func NewRecords(n Network) *Records {
	r := &Records{
		entries: make(map[string]Entry),
		names:   make(map[string]*bucket[netip.Addr]),
		addrs:   make(map[netip.Addr]*bucket[string]),
	}
	for _, d := range n.Domains {
		if d, ok := canonical(d); ok && d != "." {
			r.domains = append(r.domains, d)
		}
	}
	for _, s := range n.Subnets {
		r.subnets = append(r.subnets, s.Masked())
	}
	r.reserve(hostID, n.Host, "host.containers.internal", "host.docker.internal")
	r.reserve(gatewayID, n.Gateway, "gateway.containers.internal", "gateway.docker.internal")
	return r
}

func (r *Records) reserve(id string, addrs []netip.Addr, names ...string) {
	r.Set(id, Entry{Names: names, Addrs: addrs})
	r.reserved = append(r.reserved, r.entries[id].Names...)
}

// canonical brings a name into the form that Source.Lookup gets.
func canonical(name string) (string, bool) {
	var space [256]byte
	if _, err := miekg.PackDomainName(miekg.Fqdn(name), space[:], 0, nil, false); err != nil || name == "" {
		return "", false
	}
	name, _, err := miekg.UnpackDomainName(space[:], 0)
	return miekg.CanonicalName(name), err == nil
}

// entry brings names and addresses into the form that they are kept in.
func entry(names []string, addrs []netip.Addr) Entry {
	var e Entry
	for _, n := range names {
		if n, ok := canonical(n); ok && n != "." && !slices.Contains(e.Names, n) {
			e.Names = append(e.Names, n)
		}
	}
	for _, a := range addrs {
		if a = a.Unmap().WithZone(""); a.IsValid() && !slices.Contains(e.Addrs, a) {
			e.Addrs = append(e.Addrs, a)
		}
	}
	return e
}

// Set replaces what the endpoint id is called and where it is, in one step. Its names may be others' as well: they
// share them.
func (r *Records) Set(id string, e Entry) {
	e = entry(e.Names, e.Addrs)
	e.Names = slices.DeleteFunc(e.Names, func(n string) bool { return slices.Contains(r.reserved, n) })
	r.mu.Lock()
	defer r.mu.Unlock()
	r.removeLocked(id)
	r.addLocked(id, e)
}

// Delete forgets the endpoint id, if it is known.
func (r *Records) Delete(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.removeLocked(id)
}

func (r *Records) addLocked(id string, e Entry) {
	if len(e.Names) == 0 || len(e.Addrs) == 0 {
		return
	}
	r.entries[id] = e
	for _, name := range e.Names {
		put(r.names, name, id, e.Addrs)
	}
	for _, a := range e.Addrs {
		put(r.addrs, a, id, []string{r.proper(e.Names[0])})
	}
}

func (r *Records) removeLocked(id string) {
	e := r.entries[id]
	delete(r.entries, id)
	for _, name := range e.Names {
		drop(r.names, name, id)
	}
	for _, a := range e.Addrs {
		drop(r.addrs, a, id)
	}
}

// proper is the name that a reverse lookup gives: in the network's first domain if it has one and the name is a
// single label, as Docker does it.
func (r *Records) proper(name string) string {
	full := ""
	if len(r.domains) > 0 && miekg.CountLabel(name) == 1 {
		full = name + r.domains[0]
	}
	if len(full) > 0 && len(full) < 255 {
		return full
	}
	return name
}

// Lookup implements Source.
func (r *Records) Lookup(name string) (Answer, bool) {
	if p, full, ok := parseReverse(name); ok {
		return r.lookupReverse(name, p, full)
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	if b, ok := r.names[name]; ok {
		return Answer{Addrs: b.merged}, true
	}
	for _, domain := range r.domains {
		short, ok := strings.CutSuffix(name, domain)
		if !ok || short != "" && short[len(short)-1] != '.' {
			continue
		}
		if b, ok := r.names[short]; ok {
			return Answer{Addrs: b.merged, Zone: domain}, true
		}
		return Answer{Missing: short != "", Zone: domain}, true
	}
	return Answer{}, false
}

// lookupReverse answers for a name that stands for the addresses in p; full tells that it is one whole address.
func (r *Records) lookupReverse(name string, p netip.Prefix, full bool) (Answer, bool) {
	if full {
		r.mu.RLock()
		b, ok := r.addrs[p.Addr()]
		r.mu.RUnlock()
		if ok {
			return Answer{Names: b.merged}, true
		}
	}
	for _, s := range r.subnets {
		if s.Bits() <= p.Bits() && s.Contains(p.Addr()) {
			// The zone is the parent of the name; the name itself exists where further digits may follow.
			_, zone, _ := strings.Cut(name, ".")
			return Answer{Missing: full || p.Bits() == p.Addr().BitLen(), Zone: zone}, true
		}
	}
	return Answer{}, false
}

// bucket is what one name or address has, and from which endpoint, in the order of their coming.
type bucket[V comparable] struct {
	parts  []part[V]
	merged []V // each value once; replaced as a whole, never changed
}

type part[V comparable] struct {
	id     string
	values []V
}

func put[K, V comparable](m map[K]*bucket[V], key K, id string, values []V) {
	old := m[key]
	if old == nil {
		old = new(bucket[V])
	}
	m[key] = newBucket(append(slices.Clone(old.parts), part[V]{id, values}))
}

func drop[K, V comparable](m map[K]*bucket[V], key K, id string) {
	old := m[key]
	if old == nil {
		return
	}
	parts := slices.DeleteFunc(slices.Clone(old.parts), func(p part[V]) bool { return p.id == id })
	if len(parts) == 0 {
		delete(m, key)
		return
	}
	m[key] = newBucket(parts)
}

func newBucket[V comparable](parts []part[V]) *bucket[V] {
	b := &bucket[V]{parts: parts}
	for _, p := range parts {
		for _, v := range p.values {
			if !slices.Contains(b.merged, v) {
				b.merged = append(b.merged, v)
			}
		}
	}
	return b
}
