package usermode

import (
	"errors"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/usernet/usernet/internal/splice"
	"github.com/usernet/usernet/usermode/tcprelay"
)

// opening is a connection on the fast path from its SYN until both halves stand.
type opening struct {
	path   *fastPath
	inject func(frame []byte) error // sends into the fabric
	syn    syn
	host   int          // the socket to the destination
	sent   bool         // the SYN went back into the fabric; path.mu
	late   *transparent // where its connection will be accepted, if it is not at once; path.mu
	timer  *time.Timer  // bounds that; path.mu
}

// take takes f if it is a SYN that opens a connection.
func (p *fastPath) take(f *frame, inject func([]byte) error) bool {
	s, ok := parseSYN(f)
	if !ok || p.listener(s.destination.Addr()) == nil {
		return false
	}
	o := &opening{path: p, inject: inject, syn: s, host: -1}
	if !p.add(o) {
		return true
	}
	client := s.client.Addr()
	if !p.made.Take(client) {
		p.remove(o)
		inject(s.reset())
		return true
	}
	if !p.pending.Take(client) { // it will be repeated
		p.remove(o)
		p.made.Put(client)
		return true
	}
	if err := o.dial(); err != nil {
		o.giveUp(err)
		return true
	}
	// What follows may come about after the packet's memory was used again.
	o.syn.packet = append([]byte(nil), o.syn.packet...)
	p.group.Connect(o.host, tcprelay.DialTimeout, o.dialled)
	return true
}

// listener is the one of a's family.
func (p *fastPath) listener(a netip.Addr) *transparent {
	for _, ln := range p.listeners {
		if ln.at.Addr().Is4() == a.Is4() {
			return ln
		}
	}
	return nil
}

// add enters o, unless its SYN is a repetition.
func (p *fastPath) add(o *opening) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.openings[o.syn.route] != nil {
		return false
	}
	p.openings[o.syn.route] = o
	return true
}

// remove takes o out, and tells whether it was in: whoever did that has to see to what o holds.
func (p *fastPath) remove(o *opening) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.openings[o.syn.route] != o {
		return false
	}
	delete(p.openings, o.syn.route)
	if o.late != nil {
		o.timer.Stop()
		if o.late.late--; o.late.late == 0 {
			o.late.expect(false)
		}
	}
	return true
}

var errRefused = errors.New("the destination is not for containers")

// dial begins to connect to the destination.
func (o *opening) dial() error {
	addr, ok := o.path.resolve(o.syn.destination.Addr())
	if !ok {
		return errRefused
	}
	fd, err := splice.Socket(addr)
	if err != nil {
		return err
	}
	o.host = fd
	to := netip.AddrPortFrom(addr, o.syn.destination.Port())
	if err := unix.Connect(fd, splice.Sockaddr(to)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return os.NewSyscallError("connect", err)
	}
	return nil
}

// dialled goes on when the host's half stands or has failed.
func (o *opening) dialled(err error) {
	if err != nil {
		o.giveUp(err)
		return
	}
	p := o.path
	p.mu.Lock()
	o.sent = true
	p.mu.Unlock()
	if err := o.inject(o.syn.frame()); err != nil {
		o.giveUp(err)
		return
	}
	ln := p.listener(o.syn.destination.Addr())
	for !o.over() {
		conn, peer, err := splice.Accept(ln.fd)
		if err != nil {
			o.wait(ln)
			return
		}
		p.deliver(conn, peer)
	}
}

// over tells whether o has come to its end, one way or the other.
func (o *opening) over() bool {
	o.path.mu.Lock()
	defer o.path.mu.Unlock()
	return o.path.openings[o.syn.route] != o
}

// wait leaves it to the thread that serves the listener to accept o's connection.
func (o *opening) wait(ln *transparent) {
	p := o.path
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.openings[o.syn.route] != o {
		return
	}
	o.late = ln
	o.timer = time.AfterFunc(tcprelay.HandshakeTimeout, func() { o.giveUp(os.ErrDeadlineExceeded) })
	if ln.late++; ln.late == 1 {
		ln.expect(true)
	}
}

// deliver joins an accepted connection with its host's half. One that nobody waits for any more is refused.
func (p *fastPath) deliver(conn int, peer netip.AddrPort) {
	sa, err := unix.Getsockname(conn)
	if err != nil {
		splice.Refuse(conn)
		return
	}
	p.mu.Lock()
	o := p.openings[route{peer, splice.AddrPort(sa)}]
	waited := o != nil && o.sent
	p.mu.Unlock()
	if !waited || !p.remove(o) {
		splice.Refuse(conn)
		return
	}
	client := peer.Addr()
	p.pending.Put(client)
	p.group.Join(conn, o.host, func() { p.made.Put(client) })
}

// giveUp resets both halves.
//
// That is always a reset, whatever was wrong with the host's half. For a SYN without an answer a container would wait
// minutes, and the ICMP errors that say "unreachable" are hints that Linux keeps to itself until its retries are used
// up (RFC 1122, 4.2.3.9). A reset lets the application try its next address now.
func (o *opening) giveUp(err error) {
	if !o.path.remove(o) {
		return
	}
	client := o.syn.client.Addr()
	o.path.pending.Put(client)
	o.path.made.Put(client)
	if o.host >= 0 {
		splice.Refuse(o.host)
	}
	o.path.log.Debug("dial for a container", "client", o.syn.client, "err", err)
	o.inject(o.syn.reset())
}
