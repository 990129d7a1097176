package vmnet

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/usernet/usernet/usermode/l2"
)

const (
	// maxStations is how many addresses one port may use. IPv6 has a new one for a machine every day, and machines have networks of
	// their own behind them. A port that uses more loses what it has not used for longest.
	maxStations = 64
	// staleAfter is how long an address must have been silent before another port may take it.
	staleAfter = 30 * time.Second
)

// station is an IP address that a machine has sent from: it stays that of its port until that ends, or is silent for a while; or until
// the address is given to another one by DHCP, or the machine's Ethernet address moves to another port (package l2 says when). So no
// machine gets another one's traffic by sending from its address, and who makes up addresses has no more room than others.
type station struct {
	guest atomic.Pointer[guest]
	mac   atomic.Uint64
	seen  atomic.Int64 // Network.now
}

// stations are those of all machines. It must not be copied.
type stations struct {
	n      *Network
	shards [32]struct {
		mu sync.RWMutex
		m  map[netip.Addr]*station
	}
}

func (s *stations) init(n *Network) {
	s.n = n
	for i := range s.shards {
		s.shards[i].m = make(map[netip.Addr]*station)
	}
}

func (s *stations) shard(a netip.Addr) *struct {
	mu sync.RWMutex
	m  map[netip.Addr]*station
} {
	b := a.As16()
	return &s.shards[b[15]%uint8(len(s.shards))]
}

func (s *stations) lookup(a netip.Addr) *station {
	sh := s.shard(a)
	sh.mu.RLock()
	defer sh.mu.RUnlock()
	return sh.m[a]
}

// macOf returns the Ethernet address of the machine that has a.
func (s *stations) macOf(a netip.Addr) (l2.MAC, bool) {
	st := s.lookup(a)
	if st == nil {
		return l2.MAC{}, false
	}
	return unpack(st.mac.Load()), true
}

// holder returns the first of the addresses of the port that a is behind: who has several is one client.
func (s *stations) holder(a netip.Addr) netip.Addr {
	if st := s.lookup(a); st != nil {
		if first := st.guest.Load().first.Load(); first != nil {
			return *first
		}
	}
	return a
}

// claim returns the station of a, which is g's from now on, or nil if it is another one's.
func (s *stations) claim(g *guest, a netip.Addr, mac l2.MAC) *station {
	sh := s.shard(a)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	st := sh.m[a]
	if st == nil {
		st = &station{}
		sh.m[a] = st
	} else if other := st.guest.Load(); other != g && st.mac.Load() != pack(mac) && !s.given(st, other) {
		return nil
	}
	st.guest.Store(g)
	st.mac.Store(pack(mac))
	st.seen.Store(int64(s.n.now()))
	return st
}

// given tells whether a station of another guest may be taken.
func (s *stations) given(st *station, other *guest) bool {
	return s.n.now()-time.Duration(st.seen.Load()) > staleAfter || !slices.Contains(s.n.sw.Ports(), other.port)
}

// assign gives a, which the machine with mac has been told to use, to g.
func (s *stations) assign(g *guest, a netip.Addr, mac l2.MAC) {
	sh := s.shard(a)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if st := sh.m[a]; st != nil && st.guest.Load() != g {
		st.guest.Store(g)
		st.mac.Store(pack(mac))
		st.seen.Store(int64(s.n.now()))
	}
}

// forget removes st, if it is still g's.
func (s *stations) forget(g *guest, a netip.Addr) {
	sh := s.shard(a)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if st := sh.m[a]; st != nil && st.guest.Load() == g {
		delete(sh.m, a)
	}
}

func pack(m l2.MAC) uint64 {
	return uint64(binary.BigEndian.Uint16(m[:]))<<32 | uint64(binary.BigEndian.Uint32(m[2:]))
}

func unpack(v uint64) (m l2.MAC) {
	binary.BigEndian.PutUint16(m[:], uint16(v>>32))
	binary.BigEndian.PutUint32(m[2:], uint32(v))
	return m
}
