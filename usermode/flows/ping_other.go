//go:build !linux

package flows

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"

	"golang.org/x/net/icmp"

	"github.com/usernet/usernet/internal/icmperror"
)

// pinger is the socket of an echoSocket. Errors come among its messages, where the system has them at all.
type pinger struct {
	of    *echoSocket
	conn  *icmp.PacketConn
	raw   bool
	ident uint16
}

// openPinger opens a socket for echo requests as macOS gives them to everybody, or a raw one, which is for
// administrators. The echoSocket's lock is held.
func openPinger(s *echoSocket) (*pinger, error) {
	if !s.isRunning() {
		return nil, errEnded
	}
	free, raw, local := "udp6", "ip6:ipv6-icmp", "::"
	if s.v4 {
		free, raw, local = "udp4", "ip4:icmp", "0.0.0.0"
	}
	p := &pinger{of: s, ident: uint16(rand.Uint32())}
	var err error
	if p.conn, err = icmp.ListenPacket(free, local); err != nil {
		var rawErr error
		if p.conn, rawErr = icmp.ListenPacket(raw, local); rawErr != nil {
			return nil, fmt.Errorf("open a ping socket: %w", err)
		}
		p.raw = true
	} else if a, ok := p.conn.LocalAddr().(*net.UDPAddr); ok && a.Port != 0 {
		p.ident = uint16(a.Port) // the system puts its own into requests
	}
	if !s.task(p.receive) {
		p.conn.Close()
		return nil, errEnded
	}
	return p, nil
}

// close ends the socket's goroutine.
func (p *pinger) close() error { return p.conn.Close() }

// send sends a message to host. The echoSocket's sending lock is held.
func (p *pinger) send(host netip.Addr, path pathOptions, message []byte) (told icmperror.Message, err error) {
	if s := p.of; s.path.hops != path.hops && path.hops > 0 {
		// Where the system has no such option, it sends with its own.
		if s.v4 {
			p.conn.IPv4PacketConn().SetTTL(int(path.hops))
		} else {
			p.conn.IPv6PacketConn().SetHopLimit(int(path.hops))
		}
		s.path.hops = path.hops
	}
	var to net.Addr = &net.UDPAddr{IP: host.AsSlice(), Zone: host.Zone()}
	if p.raw {
		to = &net.IPAddr{IP: host.AsSlice(), Zone: host.Zone()}
	}
	if _, err = p.conn.WriteTo(message, to); err != nil && isUnreachable(err) {
		told = icmperror.HostUnreachable(p.of.v4)
	}
	return told, err
}

// receive sends replies on, until the socket is closed.
func (p *pinger) receive() {
	b := make([]byte, maxDatagram)
	for {
		n, from, err := p.conn.ReadFrom(b)
		if err != nil {
			if p.of.isRunning() {
				p.of.cfg.Log.Warn("guests cannot ping any more", "ipv6", !p.of.v4, "err", err)
			}
			return
		}
		p.of.answer(b[:n], p.ident, addrOf(from))
	}
}

func addrOf(a net.Addr) netip.Addr {
	var ip net.IP
	switch a := a.(type) {
	case *net.UDPAddr:
		ip = a.IP
	case *net.IPAddr:
		ip = a.IP
	}
	addr, _ := netip.AddrFromSlice(ip)
	return addr.Unmap()
}
