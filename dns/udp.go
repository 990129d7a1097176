package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	miekg "github.com/miekg/dns"
)

// packets is what *net.UDPConn has and spares an allocation for each datagram.
type packets interface {
	ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
	WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error)
}

// plainPackets makes the same of any other net.PacketConn.
type plainPackets struct{ net.PacketConn }

func (p plainPackets) ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error) {
	n, from, err := p.ReadFrom(b)
	return n, addrPort(from), err
}

func (p plainPackets) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	return p.WriteTo(b, net.UDPAddrFromAddrPort(to))
}

// addrPort is the address of a TCP or UDP peer; zero if it is something else.
func addrPort(a net.Addr) netip.AddrPort {
	if a, ok := a.(interface{ AddrPort() netip.AddrPort }); ok {
		return a.AddrPort()
	}
	return netip.AddrPort{}
}

// serveUDP answers datagrams until ctx is done: what is known here before it reads the next one, the rest when
// upstream has answered.
func (s *server) serveUDP(ctx context.Context, sock net.PacketConn) error {
	defer sock.Close()
	defer context.AfterFunc(ctx, func() { sock.SetReadDeadline(time.Unix(1, 0)) })()
	var conn packets = plainPackets{sock}
	if c, ok := sock.(packets); ok {
		conn = c
	}
	in, out := make([]byte, miekg.MaxMsgSize), make([]byte, 0, miekg.MaxMsgSize)
	var q query
	var p pause
	for {
		n, from, err := conn.ReadFromUDPAddrPort(in)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("read questions: %w", err)
		case err != nil:
			if p.begins() {
				s.r.log.Warn("cannot read questions for a while", "err", err)
			}
			p.wait(ctx)
			continue
		}
		p.reset()
		if from.Port() == 0 {
			continue
		}
		reply, via := s.r.answer(&q, out, in[:n], peer{from.Addr(), overUDP})
		switch {
		case via != nil:
			deliver := func(reply []byte) { s.write(conn, reply, from) }
			s.forward(ctx, via, waiter{q.clone(), from.Addr(), q.limit(overUDP), deliver}, overUDP)
		case reply != nil:
			s.write(conn, reply, from)
		}
	}
}

func (s *server) write(conn packets, reply []byte, to netip.AddrPort) {
	// The client asks again if it does not hear from us, or it is gone.
	if _, err := conn.WriteToUDPAddrPort(reply, to); err != nil {
		s.r.log.Debug("cannot send an answer", "to", to, "err", err)
	}
}

// pause is what a loop does when it meets an error that may pass.
type pause struct{ d time.Duration }

const (
	pauseFirst = 5 * time.Millisecond
	pauseMost  = time.Second
)

// begins tells whether the last round went well.
func (p *pause) begins() bool { return p.d == 0 }
func (p *pause) reset()       { p.d = 0 }

// wait waits, twice as long each time, or until ctx is done.
func (p *pause) wait(ctx context.Context) {
	p.d = min(max(2*p.d, pauseFirst), pauseMost)
	select {
	case <-ctx.Done():
	case <-time.After(p.d):
	}
}
