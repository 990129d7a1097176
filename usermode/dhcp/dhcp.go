// Package dhcp tells the machines of one network their addresses: a DHCPv4 server (RFC 2131, 2132), and for IPv6 the router
// advertisements by which they make their own, with what stateless DHCPv6 adds. It works on messages. Server.Serve is for
// whoever has a net.PacketConn at the gateway's port 67; the rest is functions.
//
// The server is the only one on its network, and says so: who asks to go on with an address that nobody else has gets it, whether or
// not the server, which forgets when it is restarted, has ever given it out.
//
// A machine is known by its hardware address, not by its client identifier: the latter differs between the boot loader, the
// initramfs and the system of one machine, which are to have the same address.
package dhcp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"
)

// MAC is an Ethernet address.
type MAC = [6]byte

// Config is what a Server is made of.
type Config struct {
	Subnet  netip.Prefix // IPv4
	Gateway netip.Addr   // in Subnet; the server's own address, and the machines' router
	DNS     []netip.Addr // at most 16; nil: the gateway
	Search  []string     // domains in which names are looked for
	Domain  string       // of the machines' own names; "": none
	MTU     int          // 0: not told
	Lease   time.Duration
	// Static has the addresses of known machines, which nobody else gets.
	Static map[netip.Addr]MAC
	// Reserved are addresses that are never given out, besides the gateway's, the subnet's first and its last.
	Reserved []netip.Addr
	// PerPort limits the addresses of the machines behind one port of a switch; 0: 16. A port that asks for more loses what it
	// has not taken or has given back, or gets nothing. Port 0 is not limited.
	PerPort int
	// PortOf tells Serve behind which port a machine is, 0 if it is not known. nil: always 0.
	PortOf func(MAC) int
	Log    *slog.Logger
}

// Lease is an address that a machine has.
type Lease struct {
	Addr    netip.Addr
	MAC     MAC
	Name    string // as the machine calls itself, a valid label in lower case, or ""
	Port    int
	Static  bool
	Expires time.Time
}

// Server answers DHCP messages.
type Server struct {
	cfg    Config
	static map[MAC]netip.Addr
	now    func() time.Time

	mu    sync.Mutex
	table table
}

const defaultLease = time.Hour

// New checks cfg. It starts nothing.
func New(cfg Config) (*Server, error) {
	cfg.Subnet = cfg.Subnet.Masked()
	if !cfg.Subnet.Addr().Is4() || cfg.Subnet.Bits() > 30 {
		return nil, fmt.Errorf("subnet %s: want one of IPv4 with room for two machines", cfg.Subnet)
	}
	if !cfg.Subnet.Contains(cfg.Gateway) {
		return nil, fmt.Errorf("gateway %s is not in %s", cfg.Gateway, cfg.Subnet)
	}
	if cfg.DNS == nil {
		cfg.DNS = []netip.Addr{cfg.Gateway}
	}
	if len(cfg.DNS) > 16 {
		return nil, fmt.Errorf("%d DNS servers, want 16 at most", len(cfg.DNS))
	}
	if cfg.Lease <= 0 {
		cfg.Lease = defaultLease
	}
	if cfg.PerPort == 0 {
		cfg.PerPort = 16
	}
	if cfg.PortOf == nil {
		cfg.PortOf = func(MAC) int { return 0 }
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{cfg: cfg, static: make(map[MAC]netip.Addr), now: time.Now}
	taken := map[netip.Addr]bool{cfg.Gateway: true, cfg.Subnet.Addr(): true, last(cfg.Subnet): true}
	for _, a := range cfg.Reserved {
		taken[a] = true
	}
	for _, a := range slices.SortedFunc(maps.Keys(cfg.Static), netip.Addr.Compare) {
		mac := cfg.Static[a]
		if !cfg.Subnet.Contains(a) || a == cfg.Subnet.Addr() || a == last(cfg.Subnet) || a == cfg.Gateway {
			return nil, fmt.Errorf("static lease %s of %s is not a machine's in %s", a, net.HardwareAddr(mac[:]), cfg.Subnet)
		}
		if other, ok := s.static[mac]; ok {
			return nil, fmt.Errorf("static leases %s and %s are both of %s", other, a, net.HardwareAddr(mac[:]))
		}
		s.static[mac] = a
		taken[a] = true
	}
	s.table = newTable(cfg.Subnet, taken)
	return s, nil
}

// last is the last address of a subnet of IPv4.
func last(p netip.Prefix) netip.Addr {
	a := p.Addr().As4()
	for i := range a {
		a[i] |= byte(uint64(0xff) >> min(8, max(0, p.Bits()-8*i)))
	}
	return netip.AddrFrom4(a)
}

// Serve answers what comes by c, until ctx ends; then it returns nil. c is the caller's; what is sent to
// 255.255.255.255 must leave by the network that is served.
func (s *Server) Serve(ctx context.Context, c net.PacketConn) error {
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 1<<16)
	for {
		n, _, err := c.ReadFrom(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read DHCP message: %w", err)
		}
		mac, ok := machine(buf[:n])
		if !ok {
			continue
		}
		answer, ok := s.Answer(buf[:n], s.cfg.PortOf(mac))
		if !ok {
			continue
		}
		to := net.UDPAddrFromAddrPort(answer.To)
		if _, err := c.WriteTo(answer.Message, to); err != nil && ctx.Err() == nil {
			if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("answer DHCP message: %w", err)
			}
			s.cfg.Log.Warn("DHCP answer is lost", "to", answer.To, "err", err)
		}
	}
}

// Leases returns the addresses that machines have, sorted; with the static ones, whether or not their machines have asked.
func (s *Server) Leases() []Lease {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	leases := make(map[netip.Addr]Lease)
	for a, mac := range s.cfg.Static {
		leases[a] = Lease{Addr: a, MAC: mac, Static: true}
	}
	for a, r := range s.table.records {
		if r.state == leased && r.until.After(now) {
			_, static := s.cfg.Static[a]
			leases[a] = Lease{Addr: a, MAC: r.mac, Name: r.name, Port: r.port, Static: static, Expires: r.until}
		}
	}
	return slices.SortedFunc(maps.Values(leases), func(a, b Lease) int { return a.Addr.Compare(b.Addr) })
}
