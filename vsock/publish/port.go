package publish

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/usernet/usernet"
	"github.com/usernet/usernet/vsock/proxy"
)

// hostPort is a port of the host that a session has published.
type hostPort struct {
	session *session
	proto   usernet.Proto
	addr    netip.Addr // zero: all
	port    uint16
	since   time.Time
	sockets *sockets

	ctx     context.Context // done when the port is closed
	stop    context.CancelFunc
	running sync.WaitGroup // accepting goroutines, and those of connections that wait for a stream
	relays  relays

	accepted, refused atomic.Uint64
	active            atomic.Int64
}

func newHostPort(x *session, q message, opened *sockets) *hostPort {
	p := &hostPort{session: x, proto: q.Proto, addr: q.Addr, port: opened.port, since: time.Now(), sockets: opened}
	p.ctx, p.stop = context.WithCancel(context.Background())
	return p
}

func (p *hostPort) status() Port {
	return Port{Proto: p.proto, Addr: p.addr, Port: p.port, Guest: p.session.guest, Since: p.since,
		Accepted: p.accepted.Load(), Refused: p.refused.Load(), Active: int(p.active.Load())}
}

// overlaps tells whether a client could mean either the port's address or a.
func (p *hostPort) overlaps(a netip.Addr) bool {
	return !p.addr.IsValid() || p.addr == a || p.addr.Is4() == a.Is4() && (p.addr.IsUnspecified() || a.IsUnspecified())
}

// start serves the port's sockets until close.
func (p *hostPort) start() {
	for _, l := range p.sockets.tcp {
		p.running.Go(func() { p.accept(l) })
	}
	for _, c := range p.sockets.udp {
		p.running.Go(newFlows(p, c).serve)
	}
}

// close ends the port with its connections and returns when they have ended. A client whose connection it cuts gets a reset.
func (p *hostPort) close() {
	p.stop()
	p.sockets.close()
	p.relays.close()
	p.running.Wait()
}

// accept serves the clients of a listener.
func (p *hostPort) accept(l *net.TCPListener) {
	var rest pause
	for {
		conn, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			if rest == 0 {
				p.session.server.cfg.Log.Warn("no connections are accepted for a while", "port", p.port, "err", err)
			}
			rest.wait(p.ctx)
			continue
		}
		rest = 0
		p.running.Go(func() {
			if err := p.serve(conn); err != nil {
				p.refused.Add(1)
				reset(conn)
				p.session.server.cfg.Log.Debug("refused a connection", "port", p.port, "client", conn.RemoteAddr(), "err", err)
			}
		})
	}
}

var errTooMany = errors.New("the guest has too many connections")

// serve hands a client's connection to the guest.
func (p *hostPort) serve(conn *net.TCPConn) error {
	done, err := p.enter()
	if err != nil {
		return err
	}
	h := proxy.Header{Client: addrPort(conn.RemoteAddr()), Target: addrPort(conn.LocalAddr())}
	s, err := p.session.open(p.ctx.Done(), h)
	switch {
	case err != nil:
	case s.chunks:
		s.conn = newChunked(s.conn, s.early, s.conn)
	case len(s.early) > 0:
		_, err = conn.Write(s.early)
	}
	if err != nil {
		if s.conn != nil {
			s.conn.Close()
		}
		done()
		return err
	}
	p.accepted.Add(1)
	p.relays.join(conn, s.conn, done)
	return nil
}

// enter counts a connection or a flow in, if the guest may have one more, until done is called.
func (p *hostPort) enter() (done func(), err error) {
	x := p.session
	if x.conns.Add(1) > int64(x.server.cfg.Limits.Conns) {
		x.conns.Add(-1)
		return nil, errTooMany
	}
	p.active.Add(1)
	return func() {
		p.active.Add(-1)
		x.conns.Add(-1)
	}, nil
}

// addrPort is an address of package net's without the IPv6 form of IPv4.
func addrPort(a net.Addr) netip.AddrPort {
	var at netip.AddrPort
	switch a := a.(type) {
	case *net.TCPAddr:
		at = a.AddrPort()
	case *net.UDPAddr:
		at = a.AddrPort()
	}
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

// reset closes a connection so that the other end cannot take it for the end of the stream.
func reset(conn net.Conn) {
	if l, ok := conn.(interface{ SetLinger(int) error }); ok {
		l.SetLinger(0)
	}
	conn.Close()
}

// pause is how long to wait after a failure: what the system lacks comes back, and trying at once would only add to it.
type pause time.Duration

func (p *pause) wait(ctx context.Context) {
	*p = min(max(2**p, pause(5*time.Millisecond)), pause(time.Second))
	t := time.NewTimer(time.Duration(*p))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// closers are things to be closed together.
type closers struct {
	mu     sync.Mutex
	closed bool
	open   map[io.Closer]struct{}
}

// add reports false if everything has been closed already, and c with it.
func (s *closers) add(c io.Closer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		c.Close()
		return false
	}
	if s.open == nil {
		s.open = make(map[io.Closer]struct{})
	}
	s.open[c] = struct{}{}
	return true
}

func (s *closers) remove(c io.Closer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, c)
}

func (s *closers) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for c := range s.open {
		c.Close()
	}
}
